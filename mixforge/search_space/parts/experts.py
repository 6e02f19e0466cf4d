"""Experts: the same feed-forward layer many times over, their weights stacked, each token through a few of them.

    E_i(x) = W_out,i act(W_up,i x)                        plain
    E_i(x) = W_out,i (act(W_gate,i x) * W_up,i x)         gated; the stacked W_up has the gate's rows first

A sequence is sorted by expert and goes through one matrix product for each expert that it visits, so that nothing
is dropped, padded or computed twice. One token a sequence gathers the weights of its experts: the shapes of that form
depend on no value, so that a graph can capture it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixforge.kernels.dense import dense
from mixforge.search_space.parts.stacked import Stacked


class StackedLinear(Stacked):
    """A matrix [out, in] for each expert, and a bias if it is asked for."""

    def __init__(self, experts: int, into: int, out_of: int, bias: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(into)
        self.weight = nn.Parameter(torch.empty(experts, out_of, into).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(experts, out_of)) if bias else None


class Experts(nn.Module):
    """The weights of all experts; what a layer lends to others as `experts`."""

    def __init__(self, experts: int, width: int, hidden: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up = StackedLinear(experts, width, 2 * hidden if gated else hidden, bias)
        self.out = StackedLinear(experts, hidden, width, bias)

    def lent(self) -> tuple[Tensor, ...]:
        """up [E, F or 2F, D] and out [E, D, F]; with biases, those of both after them."""
        weights = (self.up.weight, self.out.weight)
        if self.up.bias is None or self.out.bias is None:
            return weights
        return (*weights, self.up.bias, self.out.bias)


@dataclass
class ExpertWeights:
    """The weights of experts as functions take them, own or borrowed (`Experts.lent`)."""

    up_EGD: Tensor
    out_EDF: Tensor
    up_bias_EG: Tensor | None = None
    out_bias_ED: Tensor | None = None


Activation = Callable[..., Tensor]


def visit_sorted(
    x_MD: Tensor, index_MA: Tensor, weights: ExpertWeights, act: Activation, gated: bool
) -> Tensor:
    """What the experts `index` of each token say of it: [M, D], [M, A] -> [M, A, D].

    The counts of tokens are read on the host, as the shapes of the products follow from them.
    """
    chosen = index_MA.shape[1]
    order_N = index_MA.flatten().argsort(stable=True)
    place_N = torch.empty_like(order_N).index_copy_(
        0, order_N, torch.arange(len(order_N), device=x_MD.device)
    )
    counts = torch.bincount(index_MA.flatten(), minlength=weights.up_EGD.shape[0]).tolist()
    # Each token once for each of its experts, and put back below: nothing is added up in the gradient but these, as a
    # scattered sum has no fixed order on a GPU.
    x_ND = x_MD[:, None].expand(-1, chosen, -1).flatten(0, 1)
    pieces = torch.split(permuted(x_ND, order_N, place_N), counts)
    # Taken apart at once: the gradient of one expert's slice would be as large as the weights of all.
    ups, outs = weights.up_EGD.unbind(0), weights.out_EDF.unbind(0)
    up_biases = _apart(weights.up_bias_EG, len(ups))
    out_biases = _apart(weights.out_bias_ED, len(outs))
    visited = [
        dense(_activated(dense(x_ND, up_GD, up_bias_G), act, gated), out_DF, out_bias_D)
        for x_ND, up_GD, up_bias_G, out_DF, out_bias_D in zip(
            pieces, ups, up_biases, outs, out_biases, strict=True
        )
        if x_ND.shape[0] > 0
    ]
    return permuted(torch.cat(visited), place_N, order_N).view(*index_MA.shape, -1)


def permuted(x_ND: Tensor, order_N: Tensor, place_N: Tensor) -> Tensor:
    """x[order], where place[order] counts from 0."""
    y_ND: Tensor = Permuted.apply(x_ND, order_N, place_N)  # type: ignore[no-untyped-call]
    return y_ND


class Permuted(torch.autograd.Function):
    """`permuted`, whose adjoint puts rows back, where that of an index adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(place_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (place_N,) = ctx.saved_tensors
        return dy_ND.index_select(0, place_N), None, None


def _apart(stacked: Tensor | None, experts: int) -> Sequence[Tensor | None]:
    """What each expert has of it."""
    return [None] * experts if stacked is None else stacked.unbind(0)


def visit_gathered(
    x_BD: Tensor, index_BA: Tensor, weights: ExpertWeights, act: Activation, gated: bool
) -> Tensor:
    """The same for a few tokens, with the weights of their experts gathered: [B, D], [B, A] -> [B, A, D]."""
    h_BAG = torch.einsum("bagd,bd->bag", weights.up_EGD[index_BA], x_BD)
    if weights.up_bias_EG is not None:
        h_BAG = h_BAG + weights.up_bias_EG[index_BA]
    h_BAF = _activated(h_BAG, act, gated)
    y_BAD = torch.einsum("badf,baf->bad", weights.out_EDF[index_BA], h_BAF)
    return y_BAD if weights.out_bias_ED is None else y_BAD + weights.out_bias_ED[index_BA]


def _activated(h: Tensor, act: Activation, gated: bool) -> Tensor:
    return act(*h.chunk(2, -1)) if gated else act(h)
