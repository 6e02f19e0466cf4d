"""Softmax attention: o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over s <= t, and over s > t - W with a
window.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; multi-query: Shazeer 2019 (arXiv 1911.02150);
grouped queries: Ainslie et al. 2023 (arXiv 2305.13245); sliding window: Beltagy et al. 2020 (arXiv
2004.05150), causal as in Jiang et al. 2023 (arXiv 2310.06825); rotary position: Su et al. 2021 (arXiv
2104.09864); query and key norm: Henry et al. 2020 (arXiv 2010.04245), with RMS norms and learned scales as in
Dehghani et al. 2023 (arXiv 2302.05442); output gate o * sigmoid(W_g x): Qiu et al. 2025 (arXiv 2505.06708),
elementwise after the attention; one cache for many layers, `kv=own` and `kv=shared`: Sun et al. 2024 (arXiv
2405.05254), equation 3.

Departures: no biases. `kv=own` is an attention layer of its own whose keys and values the `kv=shared` layers
above read; in the paper the shared keys and values belong to no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mixforge.kernels import attention
from mixforge.kernels.attention import attended_pairs, step_attention
from mixforge.search_space.genes import Call, Choice, Form, Whole
from mixforge.search_space.heads import default_heads, heads_that_divide, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.rotary import rotate


@dataclass(frozen=True, slots=True)
class Attn(Mixer):
    """Softmax attention. `kv`: every query head has its keys and values (mha), all share one (mqa), or n do
    (gqa(n)); `own` also publishes them to the layers above, and `shared` reads what the nearest `own` below
    has published.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None
    kv: Annotated[str | Form, Choice("mha", "mqa", "own", "shared"), Call("gqa", Whole(1, 256))] = "mha"
    window: Annotated[str | int, Choice("none"), Whole(2, 1048576)] = "none"
    pos: Annotated[str, Choice("rope", "none")] = "rope"
    qk_norm: Annotated[str, Choice("none", "rms")] = "none"
    out_gate: Annotated[str, Choice("none", "sigmoid")] = "none"

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Query heads, key/value heads (those it reads, for `shared`) and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        head_dim = max(1, width // heads) if self.head_dim is None else self.head_dim
        if isinstance(self.kv, Form):
            return heads, int(self.kv.arguments[0]), head_dim
        return heads, 1 if self.kv == "mqa" else heads, head_dim

    def lends(self, width: int) -> Mapping[str, Loan]:
        return {"cache": self._loan(width)} if self.kv == "own" else {}

    def borrows(self, width: int) -> Mapping[str, Loan]:
        return {"cache": self._loan(width)} if self.kv == "shared" else {}

    def _loan(self, width: int) -> Loan:
        """Keys and values."""
        return Loan("cache", (self.sizes(width)[1:], self.sizes(width)[1:]))

    def unread(self, names: frozenset[str]) -> Self:
        return replace(self, kv="mha") if "cache" in names else self

    def why_illegal(self, width: int) -> str | None:
        heads, kv_heads, head_dim = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return (
                f"heads {heads} does not divide width {width} (mixer attn); "
                f"legal heads: {heads_that_divide(width)}, or say head_dim"
            )
        if heads % kv_heads != 0:
            return f"{kv_heads} key/value heads do not divide {heads} query heads (mixer attn)"
        if self.pos == "rope" and head_dim % 2 != 0:
            return f"pos=rope needs an even head_dim, not {head_dim} (mixer attn)"
        if self.window != "none" and self.kv in ("own", "shared"):
            return f"kv={self.kv} is a cache of every token, so it takes no window (mixer attn)"
        return None

    def canonical(self, width: int) -> Self:
        heads, kv_heads, head_dim = self.sizes(width)
        kv = self.kv
        if isinstance(kv, Form):
            kv = "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else kv
        if kv == "mqa" and heads == 1:
            kv = "mha"
        default_dim = max(1, width // heads)
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if head_dim == default_dim and width % heads == 0 else head_dim,
            kv=kv,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        if self.kv in ("own", "shared"):
            raise ValueError(f"attn(kv={self.kv}) has no heads to give away; give it no factor inside '|'")
        heads, _, head_dim = self.sizes(width)
        # gqa(n) says how many key/value heads this branch has, so the share leaves it as it is.
        return replace(self, heads=shared_heads("attn", heads, share), head_dim=head_dim).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, kv_heads, head_dim = self.sizes(width)
        reads = self.kv == "shared"
        into = heads * head_dim * (2 if self.out_gate == "sigmoid" else 1)
        into += 0 if reads else 2 * kv_heads * head_dim
        matrices = width * (into + heads * head_dim)
        norms = (0 if self.qk_norm == "none" else 1 if reads else 2) * head_dim
        pairs = attended_pairs(length, None if isinstance(self.window, str) else self.window)
        kept = length if isinstance(self.window, str) else min(length, self.window)
        token_bytes = 2 * kv_heads * head_dim * itemsize
        weights = (matrices + norms) * itemsize
        return Cost(
            params=matrices + norms,
            flops=2 * length * matrices + 4 * pairs * heads * head_dim,
            state_bytes=0 if reads else kept * token_bytes,
            decode_bytes=weights + kept * token_bytes + (0 if reads else token_bytes),
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, kv_heads, head_dim = self.sizes(width)
        common = {
            "width": width,
            "heads": heads,
            "head_dim": head_dim,
            "theta": 10000.0 if self.pos == "rope" else None,
            "query_norm": norm_part(head_dim, backend) if self.qk_norm == "rms" else None,
            "gated": self.out_gate == "sigmoid",
        }
        if self.kv == "shared":
            return Part(SharedAttention, **common, operation=attention.form(backend))
        key_norm = norm_part(head_dim, backend) if self.qk_norm == "rms" else None
        if isinstance(self.window, int):
            return Part(
                WindowAttention,
                **common,
                kv_heads=kv_heads,
                key_norm=key_norm,
                window=self.window,
                operation=attention.window_form(backend),
            )
        return Part(
            Attention,
            **common,
            kv_heads=kv_heads,
            key_norm=key_norm,
            publishes=self.kv == "own",
            operation=attention.form(backend),
        )


class Queries(nn.Module):
    """What every kind of attention does around its keys and values: queries in, gate and output projection
    out."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        theta: float | None,
        query_norm: nn.Module | None,
        gated: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.theta = theta
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.query_norm = query_norm
        self.gate = nn.Linear(width, heads * head_dim, bias=False) if gated else None
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def ask(self, x_BTD: Tensor, positions_T: Tensor) -> Tensor:
        """Queries [B, H, T, K]."""
        q_BTHK = split_heads(self.query(x_BTD), self.heads)
        if self.query_norm is not None:
            q_BTHK = self.query_norm(q_BTHK)
        if self.theta is not None:
            q_BTHK = rotate(q_BTHK, positions_T, self.theta)
        return q_BTHK.transpose(1, 2)

    def answer(self, o_BHTK: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate the heads' outputs [B, H, T, K] and project them to [B, T, D]."""
        o_BTF = o_BHTK.transpose(1, 2).flatten(2)
        if self.gate is not None:
            o_BTF = o_BTF * torch.sigmoid(self.gate(x_BTD))
        y: Tensor = self.out(o_BTF)
        return y


class KeysValues(nn.Module):
    """Keys and values [B, H, T, K] of a sequence, before any cache."""

    def __init__(
        self, width: int, heads: int, head_dim: int, theta: float | None, key_norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.theta = theta
        self.key = nn.Linear(width, heads * head_dim, bias=False)
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        self.key_norm = key_norm

    def forward(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        k_BTHK = split_heads(self.key(x_BTD), self.heads)
        v_BTHK = split_heads(self.value(x_BTD), self.heads)
        if self.key_norm is not None:
            k_BTHK = self.key_norm(k_BTHK)
        if self.theta is not None:
            k_BTHK = rotate(k_BTHK, positions_T, self.theta)
        return k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Room for `slots` tokens."""
        shape = (batch, self.heads, slots, self.head_dim)
        return {
            "key": torch.zeros(shape, device=device, dtype=dtype),
            "value": torch.zeros(shape, device=device, dtype=dtype),
        }


class Attention(TokenMixer):
    """Attention over every earlier token, with a cache of `capacity` slots."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        theta: float | None,
        query_norm: nn.Module | None,
        key_norm: nn.Module | None,
        gated: bool,
        publishes: bool,
        operation: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    ) -> None:
        super().__init__()
        self.publishes = publishes
        self.operation = operation
        self.queries = Queries(width, heads, head_dim, theta, query_norm, gated)
        self.memory = KeysValues(width, kv_heads, head_dim, theta, key_norm)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.memory.initial_state(batch, capacity, device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        k_BHTK, v_BHTK = self.memory(x_BTD, at.positions_T)
        if state is not None:
            end = at.start + x_BTD.shape[1]
            state["key"][:, :, at.start : end] = k_BHTK
            state["value"][:, :, at.start : end] = v_BHTK
            if at.start > 0:
                k_BHTK, v_BHTK = state["key"][:, :, :end], state["value"][:, :, :end]
        if self.publishes:
            at.shared["cache"] = (k_BHTK, v_BHTK)
        o_BHTK = self.operation(self.queries.ask(x_BTD, at.positions_T), k_BHTK, v_BHTK, at.start)
        return self.queries.answer(o_BHTK, x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        k_BHTK, v_BHTK = self.memory(x_BTD, at.positions_T)
        state["key"].index_copy_(2, at.positions_T, k_BHTK)
        state["value"].index_copy_(2, at.positions_T, v_BHTK)
        if self.publishes:
            at.shared["cache"] = (state["key"], state["value"])
        o_BHTK = step_attention(
            self.queries.ask(x_BTD, at.positions_T), state["key"], state["value"], at.positions_T
        )
        return self.queries.answer(o_BHTK, x_BTD)[:, 0], state


class SharedAttention(TokenMixer):
    """Attention that reads the keys and values that a layer below has published, and keeps none."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        theta: float | None,
        query_norm: nn.Module | None,
        gated: bool,
        operation: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    ) -> None:
        super().__init__()
        self.operation = operation
        self.queries = Queries(width, heads, head_dim, theta, query_norm, gated)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        k_BHTK, v_BHTK = at.shared["cache"]
        o_BHTK = self.operation(self.queries.ask(x_BTD, at.positions_T), k_BHTK, v_BHTK, at.start)
        return self.queries.answer(o_BHTK, x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        k_BHTK, v_BHTK = at.shared["cache"]
        o_BHTK = step_attention(self.queries.ask(x_BTD, at.positions_T), k_BHTK, v_BHTK, at.positions_T)
        return self.queries.answer(o_BHTK, x_BTD)[:, 0], state


class WindowAttention(TokenMixer):
    """Attention over the last `window` tokens, its own included; the cache is a ring: token t is in slot t
    mod W."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        theta: float | None,
        query_norm: nn.Module | None,
        key_norm: nn.Module | None,
        gated: bool,
        window: int,
        operation: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
    ) -> None:
        super().__init__()
        self.window = window
        self.operation = operation
        self.queries = Queries(width, heads, head_dim, theta, query_norm, gated)
        self.memory = KeysValues(width, kv_heads, head_dim, theta, key_norm)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.memory.initial_state(batch, min(self.window, capacity), device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        q_BHTK = self.queries.ask(x_BTD, at.positions_T)
        k_BHTK, v_BHTK = self.memory(x_BTD, at.positions_T)
        if at.start == 0 or state is None:
            o_BHTK = self.operation(q_BHTK, k_BHTK, v_BHTK, self.window, 0)
        else:
            # Tokens start - past to start - 1, in order, from their slots in the ring.
            past = min(at.start, self.window - 1)
            ring = torch.arange(at.start - past, at.start, device=x_BTD.device) % state["key"].shape[2]
            wide_k_BHTK = torch.cat([state["key"][:, :, ring], k_BHTK], 2)
            wide_v_BHTK = torch.cat([state["value"][:, :, ring], v_BHTK], 2)
            o_BHTK = self.operation(q_BHTK, wide_k_BHTK, wide_v_BHTK, self.window, past)
        if state is not None:
            slots = state["key"].shape[2]
            kept = min(slots, x_BTD.shape[1])
            ring = at.positions_T[-kept:] % slots
            state["key"].index_copy_(2, ring, k_BHTK[:, :, -kept:])
            state["value"].index_copy_(2, ring, v_BHTK[:, :, -kept:])
        return self.queries.answer(o_BHTK, x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        k_BHTK, v_BHTK = self.memory(x_BTD, at.positions_T)
        ring = at.positions_T % state["key"].shape[2]
        state["key"].index_copy_(2, ring, k_BHTK)
        state["value"].index_copy_(2, ring, v_BHTK)
        # A full ring has every slot filled, so the mask of a growing cache is right for it too.
        o_BHTK = step_attention(
            self.queries.ask(x_BTD, at.positions_T), state["key"], state["value"], at.positions_T
        )
        return self.queries.answer(o_BHTK, x_BTD)[:, 0], state
