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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from torch import nn

from mixforge.kernels import attention
from mixforge.kernels.attention import attended_pairs
from mixforge.search_space.genes import Call, Choice, Form, Whole
from mixforge.search_space.heads import default_heads, heads_that_divide, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attention import Attention
from mixforge.search_space.parts.attention_heads import Output, Queries
from mixforge.search_space.parts.attention_memory import Borrowed, KeysValues
from mixforge.search_space.parts.attention_pattern import EveryToken, Window
from mixforge.search_space.parts.attention_position import Position, Rotary
from mixforge.search_space.parts.attention_scores import Fused
from mixforge.search_space.parts.norm import norm_part


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
        heads, _, head_dim = self.sizes(width)
        normed = self.qk_norm == "rms"
        return Part(
            Attention,
            queries=Part(
                Queries,
                heads=heads,
                query=Part(nn.Linear, in_features=width, out_features=heads * head_dim, bias=False),
                norm=norm_part(head_dim, backend) if normed else None,
            ),
            memory=self._memory(width, backend),
            position=Part(Rotary, channels=head_dim, theta=10000.0) if self.pos == "rope" else Part(Position),
            pattern=self._pattern(backend),
            scores=Part(Fused, scale=head_dim**-0.5),
            output=Part(Output, width=width, channels=heads * head_dim, gated=self.out_gate == "sigmoid"),
        )

    def _memory(self, width: int, backend: Backend) -> Part:
        _, kv_heads, head_dim = self.sizes(width)
        if self.kv == "shared":
            return Part(Borrowed)
        norm = norm_part(head_dim, backend) if self.qk_norm == "rms" else None
        return Part(
            KeysValues,
            width=width,
            heads=kv_heads,
            head_dim=head_dim,
            norm=norm,
            publishes=self.kv == "own",
        )

    def _pattern(self, backend: Backend) -> Part:
        if isinstance(self.window, str):
            return Part(EveryToken, operation=attention.form(backend))
        return Part(
            Window,
            window=self.window,
            dilation=1,
            first=0,
            shorter=None,
            operation=attention.window_form(backend),
            masked=attention.masked_form(backend),
        )
