"""What attention keeps of a token, and keys and values made of it.

    heads     k = W_k x, v = W_v x, kept as they are; the keys of one head for all of them with shared keys
    latent    c = norm(W_c x), r = turned(W_r x), kept; k_h = [r, U_h c], v_h = V_h c
    reuse     k = W_k x, kept before it is turned; v = k + a * (N k)
    shift     k_t = g_t k'_{t-1} + (1 - g_t) k'_t with g_t = sigmoid(w x_t), and values alike

A memory says what it keeps by name (`kept`), makes it of the tokens of a pass (`entries`), and turns what a pattern
brings back into keys and values (`read`). A cache of [B, heads, slots, channels] for each name is the module's around
it. A step over latents never makes keys and values: U is applied to the query and V to the output (`absorb`,
`release`), and the latents are the keys and values of all heads.

Sources: DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1, equations 9 to 19; Hu et al. 2024 (arXiv 2412.19255),
section 3, for values made of keys; Lin et al. 2025 (arXiv 2503.02130), section 3.2, for shifted keys and values; He
et al. 2024 (Rodimus, arXiv 2410.06577), for shared keys.

Departures: the turned channels stand first in keys of latents and in queries, where the reference code has them last.
The values of `reuse` are made of keys before any norm of the keys, and a starts at 0.1, for at the paper's 0 no
gradient reaches N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.attention_heads import normalised
from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, split_heads


class Memory(nn.Module):
    """Abstract."""

    publishes: bool = False
    """Whether layers above read its keys and values."""
    turns_late: bool = False
    """Whether `read` needs the angles of the tokens that are read."""

    def kept(self) -> dict[str, tuple[int, int]]:
        """Heads and channels of each entry that is kept of a token."""
        raise NotImplementedError

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What it carries from token to token beside the entries."""
        return {}

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        """Entries [B, H, T, ...] of the tokens of a pass. The state is brought up to date in place."""
        raise NotImplementedError

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, K] and values [B, H, S, V] of the tokens whose entries these are."""
        raise NotImplementedError

    def absorb(self, q_BHTK: Tensor) -> Tensor:
        """Queries of a step over what `read_step` returns."""
        return q_BHTK

    def read_step(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values of a step."""
        return self.read(entries, angle, at)

    def release(self, o_BHTV: Tensor) -> Tensor:
        """The heads' outputs of a step."""
        return o_BHTV


class TokenShift(nn.Module):
    """g_t x'_{t-1} + (1 - g_t) x'_t for each head, with nothing before the first token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.share = Dense(width, heads, bias=False)

    def forward(self, new_BTF: Tensor, x_BTD: Tensor, last_BF: Tensor | None) -> Tensor:
        """The last row of `new` is written into `last`."""
        before = torch.zeros_like(new_BTF[:, :1]) if last_BF is None else last_BF[:, None]
        past_BTF = torch.cat([before, new_BTF[:, :-1]], 1)
        share = torch.sigmoid(self.share(x_BTD))[..., None]
        past, new = split_heads(past_BTF, self.heads), split_heads(new_BTF, self.heads)
        mixed = share * past + (1 - share) * new
        if last_BF is not None:
            last_BF.copy_(new_BTF[:, -1])
        return mixed.flatten(2)


class KeysValues(Memory):
    """Values of `heads` heads, and keys of as many or of one; with `publishes`, for layers above as well."""

    def __init__(
        self,
        heads: int,
        key_heads: int,
        head_dim: int,
        key: nn.Module,
        value: nn.Module,
        key_norm: nn.Module | None,
        whole: bool,
        key_shift: TokenShift | None,
        value_shift: TokenShift | None,
        publishes: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.key_heads = key_heads
        self.head_dim = head_dim
        self.whole = whole
        self.publishes = publishes
        self.key = key
        self.value = value
        self.key_norm = key_norm
        self.key_shift = key_shift
        self.value_shift = value_shift

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (self.key_heads, self.head_dim), "value": (self.heads, self.head_dim)}

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.key_shift is None:
            return {}
        heads = {"last_key": self.key_heads, "last_value": self.heads}
        return {
            name: torch.zeros(batch, count * self.head_dim, device=device, dtype=dtype)
            for name, count in heads.items()
        }

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        k_BTHK, v_BTHV = self.make(x_BTD, state)
        return {"key": turned(k_BTHK, angle).transpose(1, 2), "value": v_BTHV.transpose(1, 2)}

    def make(self, x_BTD: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys before they are turned, and values, [B, T, H, K]."""
        k_BTF, v_BTF = self.key(x_BTD), self.value(x_BTD)
        if self.key_shift is not None and self.value_shift is not None:
            k_BTF = self.key_shift(k_BTF, x_BTD, None if state is None else state["last_key"])
            v_BTF = self.value_shift(v_BTF, x_BTD, None if state is None else state["last_value"])
        return normalised(k_BTF, self.key_heads, self.key_norm, self.whole), split_heads(v_BTF, self.heads)

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        k_BHSK = entries["key"]
        if self.key_heads != self.heads:
            k_BHSK = k_BHSK.expand(-1, self.heads, -1, -1)
        return k_BHSK, entries["value"]


class Borrowed(Memory):
    """The keys and values that a layer below has published. Nothing is kept."""

    def kept(self) -> dict[str, tuple[int, int]]:
        return {}

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        return {}

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        k_BHSK, v_BHSK = at.shared["cache"]
        return k_BHSK, v_BHSK


class ReusedKeys(Memory):
    """One key head for all queries, and values made of its keys. Only the key is kept."""

    turns_late = True

    def __init__(
        self, head_dim: int, key: nn.Module, key_norm: nn.Module | None, key_shift: TokenShift | None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.key = key
        self.key_norm = key_norm
        self.key_shift = key_shift
        self.mix = Dense(head_dim, head_dim, bias=False)
        self.share = nn.Parameter(torch.full((head_dim,), 0.1))

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (1, self.head_dim)}

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.key_shift is None:
            return {}
        return {"last_key": torch.zeros(batch, self.head_dim, device=device, dtype=dtype)}

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        k_BTK = self.key(x_BTD)
        if self.key_shift is not None:
            k_BTK = self.key_shift(k_BTK, x_BTD, None if state is None else state["last_key"])
        return {"key": k_BTK[:, None]}

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        kept_BHSK = entries["key"]
        v_BHSK = kept_BHSK + self.share * self.mix(kept_BHSK)
        k_BHSK = kept_BHSK if self.key_norm is None else self.key_norm(kept_BHSK)
        return turned(k_BHSK.transpose(1, 2), angle).transpose(1, 2), v_BHSK


class Latents(Memory):
    """A normalised latent of `rank` channels and `rope_dim` channels that all heads share."""

    def __init__(
        self, width: int, heads: int, head_dim: int, rank: int, rope_dim: int, norm: nn.Module
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.rank = rank
        self.rope_dim = rope_dim
        self.down = Dense(width, rope_dim + rank, bias=False)
        self.norm = norm
        self.up = Dense(rank, heads * 2 * head_dim, bias=False)

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"latent": (1, self.rope_dim + self.rank)}

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        r_BTK, c_BTK = torch.split(self.down(x_BTD), [self.rope_dim, self.rank], -1)
        r_BTK = turned(r_BTK[:, :, None], angle)[:, :, 0]
        return {"latent": torch.cat([r_BTK, self.norm(c_BTK)], -1)[:, None]}

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        r_BHSK, c_BHSK = torch.split(entries["latent"], [self.rope_dim, self.rank], -1)
        both_BHSK = split_heads(self.up(c_BHSK[:, 0]), self.heads).transpose(1, 2)
        k_BHSK, v_BHSK = both_BHSK.chunk(2, -1)
        return torch.cat([r_BHSK.expand(-1, self.heads, -1, -1), k_BHSK], -1), v_BHSK

    def maps(self) -> Tensor:
        """U and V of each head: [H, 2, K, rank]."""
        return self.up.weight.view(self.heads, 2, self.head_dim, self.rank)

    def absorb(self, q_BHTK: Tensor) -> Tensor:
        q_BHTK, inner_BHTK = torch.split(q_BHTK, [self.rope_dim, self.head_dim], -1)
        return torch.cat([q_BHTK, torch.einsum("bhtk,hkr->bhtr", inner_BHTK, self.maps()[:, 0])], -1)

    def read_step(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        return entries["latent"], entries["latent"][..., self.rope_dim :]

    def release(self, o_BHTV: Tensor) -> Tensor:
        return torch.einsum("bhtr,hkr->bhtk", o_BHTV, self.maps()[:, 1])
