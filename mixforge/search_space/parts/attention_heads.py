"""What every kind of attention does around its keys and values: queries in, heads' outputs combined and projected.

    low rank     q = W_up norm(W_down x)
    two maps     q_m = (W + B_m A_m) x for m = 1, 2: one base and an update of low rank for each map
    l2           q = g_h sqrt(K) q / |q|, k = k / |k|: with the scale of 1 / sqrt(K), g_h times the cosine
    ssmax        q_t s_h log n_t, n_t keys being seen: softmax with the base n_t

Sources: DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1.2, and Hu et al. 2024 (arXiv 2412.19255) for queries of low
rank; Cang et al. 2025 (arXiv 2501.17900) for shared differential maps; Henry et al. 2020 (arXiv 2010.04245), equation
4, and Liu et al. 2022 (arXiv 2111.09883), equation 2, for cosines, which start at g = 10 as in the latter; Nakanishi
2025 (arXiv 2501.19399), equation 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_experts import Route
from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads

# Of softmax with a base that grows: 1 over the mean of log n for n up to 1,024, so that training starts near to softmax.
SSMAX_START = 0.168


class LowRank(nn.Module):
    """W_up norm(W_down x)."""

    def __init__(self, width: int, rank: int, channels: int, bias: bool, norm: nn.Module) -> None:
        super().__init__()
        self.down = Dense(width, rank, bias=False)
        self.norm = norm
        self.up = Dense(rank, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.norm(self.down(x)))
        return y


class TwoMaps(nn.Module):
    """[x (W + A_1 B_1), x (W + A_2 B_2)], each of `channels`."""

    def __init__(self, width: int, rank: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.base = Dense(width, channels, bias=bias)
        self.down = Dense(width, 2 * rank, bias=False)
        self.up = nn.Parameter(torch.empty(2, rank, channels).uniform_(-1, 1) * rank**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        low = torch.unflatten(self.down(x_BTD), -1, (2, self.rank))
        update = (low.transpose(1, 2) @ self.up).transpose(1, 2)
        both: Tensor = self.base(x_BTD)[..., None, :] + update
        return both.flatten(-2)


class Unit(nn.Module):
    """x / |x| over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class ScaledUnit(nn.Module):
    """g_h sqrt(K) x / |x| for [B, T, H, K]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), 10.0))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        scale_H1: Tensor = (self.weight * x_BTHK.shape[-1] ** 0.5)[:, None]
        return F.normalize(x_BTHK, dim=-1) * scale_H1


class GrowingBase(nn.Module):
    """s_h log n_t for [B, H, T, K]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), SSMAX_START))

    def forward(self, q_BHTK: Tensor, visible_T: Tensor) -> Tensor:
        exact = torch.float64 if q_BHTK.dtype == torch.float64 else torch.float32
        factor_HT = self.weight[:, None].to(exact) * visible_T.to(exact).log()
        return q_BHTK * factor_HT[..., None].to(q_BHTK.dtype)


class Queries(nn.Module):
    """Queries [B, H, T, K]: projected, normalised (with `whole`, over all heads at once), turned, tempered."""

    def __init__(
        self,
        heads: int,
        query: nn.Module,
        query_norm: nn.Module | None,
        whole: bool,
        temper: GrowingBase | None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.whole = whole
        self.query = query
        self.query_norm = query_norm
        self.temper = temper

    def forward(self, x_BTD: Tensor, angle: Tensor | None, visible_T: Tensor, route: Route | None) -> Tensor:
        q_BTF = self.query(x_BTD) if route is None else self.query(x_BTD, route)
        q_BTHK = normalised(q_BTF, self.heads, self.query_norm, self.whole)
        q_BHTK = turned(q_BTHK, angle).transpose(1, 2)
        return q_BHTK if self.temper is None else self.temper(q_BHTK, visible_T)


def normalised(x_BTF: Tensor, heads: int, norm: nn.Module | None, whole: bool) -> Tensor:
    """[B, T, H * K] -> [B, T, H, K], through a norm over each head or over all of them."""
    if norm is None:
        return split_heads(x_BTF, heads)
    y: Tensor = split_heads(norm(x_BTF), heads) if whole else norm(split_heads(x_BTF, heads))
    return y


class Differential(nn.Module):
    """o_h = (1 - start) norm(o_h - lambda o_{h + H/2}): the second half of the heads cancels noise of the first.

    lambda = exp(a_1 . b_1) - exp(a_2 . b_2) + start. Source: Ye et al. 2024 (arXiv 2410.05258), equations 1 to 3. Heads
    are paired across halves, as in the reference code of DiffLlama, where the paper pairs neighbours.
    """

    def __init__(self, head_dim: int, start: float, norm: nn.Module) -> None:
        super().__init__()
        self.start = start
        self.norm = norm
        # [a or b, term, K]
        self.weight = nn.Parameter(torch.randn(2, 2, head_dim) * 0.1)

    def pair(self, v_BHSK: Tensor) -> Tensor:
        """Values of a pair of heads side by side, for both: [B, H, S, 2 K]."""
        v_BHSV = torch.cat(v_BHSK.chunk(2, 1), -1)
        return torch.cat([v_BHSV, v_BHSV], 1)

    def forward(self, o_BHTV: Tensor) -> Tensor:
        wide = self.weight.float() if self.weight.dtype != torch.float64 else self.weight
        plus, minus = wide.prod(0).sum(-1).exp()
        strength = (plus - minus + self.start).to(o_BHTV.dtype)
        first, second = o_BHTV.chunk(2, 1)
        o: Tensor = (1 - self.start) * self.norm(first - strength * second)
        return o


class Output(nn.Module):
    """The heads' outputs [B, H, T, V] normalised, gated by sigmoid(W_g x), and projected."""

    def __init__(
        self, gate: nn.Module | None, difference: Differential | None, norm: nn.Module | None, out: nn.Module
    ) -> None:
        super().__init__()
        self.difference = difference
        self.norm = norm
        self.gate = gate
        self.out = out

    def forward(self, o_BHTV: Tensor, x_BTD: Tensor, route: Route | None = None) -> Tensor:
        if self.difference is not None:
            o_BHTV = self.difference(o_BHTV)
        if self.norm is not None:
            o_BHTV = self.norm(o_BHTV)
        o_BTF = o_BHTV.transpose(1, 2).flatten(2)
        if self.gate is not None:
            o_BTF = o_BTF * torch.sigmoid(self.gate(x_BTD))
        y: Tensor = self.out(o_BTF) if route is None else self.out(o_BTF, route)
        return y
