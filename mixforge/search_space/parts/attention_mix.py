"""Heads that mix their scores before the weighing, and their weights after it.

    static     A'_g = sum_h A_h W_hg
    dynamic    A'_ts = A_ts + (A_ts a_t^T) b_t + (A_ts c_s^T) d_s + A_ts * e_t + A_ts * f_s

A_ts [H] being the scores (or weights) of one pair. a, b, c, d [R, H] and e, f [H] are made of the query's token t and
of the key's token s: (a, b) = gelu(x W_1) W_2 with a normalised over the heads, e = tanh(x W_3).

Sources: Shazeer et al. 2020 (arXiv 2003.02436) for static ones, which are known as talking heads; Xiao et al. 2024
(arXiv 2405.08553), section 2 and algorithm 1, for dynamic ones, with norms and activations as in the reference code
of DCFormer.

Departures: the static projections, which the reference code may add to the dynamic ones, are left out there; static
ones start near the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense


class HeadMix(nn.Module):
    """Abstract. `place` is 0 before the weighing and 1 after it."""

    def kept(self) -> dict[str, tuple[int, int]]:
        """Heads and channels of what is kept of a token, as in `Memory`."""
        return {}

    def make(self, x_BTD: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What tokens do as queries, and what they do as keys, which is kept."""
        return None, {}

    def forward(self, z_BHTS: Tensor, place: int, query: Tensor | None, key: Tensor | None) -> Tensor:
        raise NotImplementedError


class StaticMix(HeadMix):
    """One matrix [H, H] for each place."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(heads) + 0.02 * torch.randn(2, heads, heads))

    def forward(self, z_BHTS: Tensor, place: int, query: Tensor | None, key: Tensor | None) -> Tensor:
        mixed = self.weight[place].T @ z_BHTS.flatten(2)
        return torch.unflatten(mixed, 2, z_BHTS.shape[2:])


class DynamicMix(HeadMix):
    """Matrices of rank `rank` and gates, made of both tokens of a pair."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.rank = rank
        hidden = 2 * heads * rank
        # Four kinds: query and key before the weighing, query and key after it.
        self.down = Dense(width, 4 * hidden, bias=False)
        self.up = nn.Parameter(torch.randn(4, hidden, 2 * rank * heads) * hidden**-0.5)
        self.gate = Dense(width, 4 * heads, bias=False)

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"mix": (1, 2 * (2 * self.rank + 1) * self.heads)}

    def make(self, x_BTD: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        inner = F.gelu(torch.unflatten(self.down(x_BTD), -1, (4, -1))).transpose(1, 2)
        both = torch.unflatten((inner @ self.up).transpose(1, 2), -1, (2, self.rank, self.heads))
        first, second = both.unbind(3)
        wide = first.float() if first.dtype != torch.float64 else first
        scale = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(first.dtype)
        gate = torch.tanh(torch.unflatten(self.gate(x_BTD), -1, (4, 1, self.heads)))
        # [B, T, kind, 2 R + 1, H]
        made = torch.cat([first * scale, second, gate], 3)
        query, key = (made[:, :, kinds].flatten(2) for kinds in (slice(0, 4, 2), slice(1, 4, 2)))
        return query, {"mix": key[:, None]}

    def forward(self, z_BHTS: Tensor, place: int, query: Tensor | None, key: Tensor | None) -> Tensor:
        assert query is not None
        assert key is not None
        by_query = self.change(z_BHTS.transpose(1, 2), place, query).transpose(1, 2)
        by_key = self.change(z_BHTS.permute(0, 3, 1, 2), place, key[:, 0]).permute(0, 2, 3, 1)
        return z_BHTS + by_query + by_key

    def change(self, z_BTHS: Tensor, place: int, made_BTF: Tensor) -> Tensor:
        """(A a^T) b + A * e for one token after the other, [B, T, H, S]."""
        made = torch.unflatten(made_BTF, 2, (2, 2 * self.rank + 1, self.heads))[:, :, place]
        first, second, gate = torch.split(made, [self.rank, self.rank, 1], 2)
        mixed: Tensor = second.transpose(2, 3) @ (first @ z_BTHS)
        return mixed + z_BTHS * gate.transpose(2, 3)
