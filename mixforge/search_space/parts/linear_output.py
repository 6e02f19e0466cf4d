"""What follows the recurrence of the linear family: skip, norm, gate and output projection.

Logits of a gate that are given stand for W_gate x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.norm import quotient_norm
from mixforge.search_space.parts.activation import silu
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense


class HeadSkip(nn.Module):
    """d_h v_t, d_h starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, v_BTHV: Tensor) -> Tensor:
        return self.weight[:, None] * v_BTHV


class ChannelSkip(nn.Module):
    """d_hc v_t, d_hc starting at 1."""

    def __init__(self, heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, value_dim))

    def forward(self, v_BTHV: Tensor) -> Tensor:
        return self.weight * v_BTHV


class ValueConvolution(nn.Module):
    """b_c + sum_j w_cj v_{t-j}: a depthwise causal convolution of the last `size` values, one filter for all heads."""

    def __init__(
        self, heads: int, value_dim: int, size: int, operation: Callable[..., tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.operation = operation
        self.weight = nn.Parameter(torch.empty(value_dim, size).uniform_(-1, 1) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(value_dim))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The last `size` - 1 values of all heads [B, D, W-1], which are zeros before the first token."""
        channels, size = self.weight.shape
        return torch.zeros(batch, self.heads * channels, size - 1, device=device, dtype=dtype)

    def forward(self, v_BTHV: Tensor, state_BDW: Tensor | None) -> tuple[Tensor, Tensor]:
        weight_DW, bias_D = self.weight.repeat(self.heads, 1), self.bias.repeat(self.heads)
        y_BTD, after_BDW = self.operation(v_BTHV.flatten(2), weight_DW, bias_D, "none", state_BDW)
        return y_BTD.view(v_BTHV.shape), after_BDW


class Bonus(nn.Module):
    """(q_t . (u k_t)) w_t: what the present token adds to a read of the state before it."""

    def __init__(self, heads: int, features: int) -> None:
        super().__init__()
        # Other at each channel, as in Peng et al. 2024: from 1 down.
        share = 1 - torch.arange(heads * features, dtype=torch.float32) / (heads * features)
        self.weight = nn.Parameter(share.view(heads, features))

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, write_BTHV: Tensor) -> Tensor:
        group = write_BTHV.shape[2] // q_BTHK.shape[2]
        products = (q_BTHK * k_BTHK).repeat_interleave(group, 2)
        return (products * self.weight).sum(-1, keepdim=True) * write_BTHV


class SimpleNorm(nn.Module):
    """x / rms(x) over the last axis, without a weight: Qin et al. 2023 (arXiv 2307.14995)."""

    def forward(self, x: Tensor) -> Tensor:
        wide = exact(x)
        return (wide * wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)


class PartsNorm(nn.Module):
    """RMS norm of each of `parts` equal pieces of the last axis; weights for all channels."""

    def __init__(self, parts: int, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.parts = parts
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, o_BTF: Tensor) -> Tensor:
        y_BTF: Tensor = self.norm(torch.unflatten(o_BTF, -1, (self.parts, -1))).flatten(-2)
        return y_BTF * self.weight


class GroupNorm(nn.Module):
    """Layer norm of each head [..., H, V], weights and biases for all channels: Wu and He 2018 (arXiv 1803.08494).

    With `least`, that of a quotient: o has a column more, for what divides it (`quotient_norm`).
    """

    def __init__(self, heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, value_dim))
        self.bias = nn.Parameter(torch.zeros(heads, value_dim))

    def forward(self, o_BTHV: Tensor, least_BTH1: Tensor | None = None) -> Tensor:
        if least_BTH1 is not None:
            return quotient_norm(o_BTHV, least_BTH1, exact(self.weight), exact(self.bias))
        wide = F.layer_norm(exact(o_BTHV), o_BTHV.shape[-1:], eps=1e-5)
        return (wide * self.weight + self.bias).to(o_BTHV.dtype)


class LowRankGate(nn.Module):
    """W_2 W_1 x + b."""

    def __init__(self, width: int, channels: int, rank: int) -> None:
        super().__init__()
        self.down = Dense(width, rank, bias=False)
        self.up = Dense(rank, channels)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTF: Tensor = self.up(self.down(x_BTD))
        return y_BTF


class InnerGate(nn.Module):
    """W_2 sigmoid(W_1 x): the gate of Peng et al. 2025 (arXiv 2503.14456)."""

    def __init__(self, width: int, channels: int, rank: int) -> None:
        super().__init__()
        self.down = Dense(width, rank, bias=False)
        self.up = Dense(rank, channels, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTF: Tensor = self.up(torch.sigmoid(self.down(x_BTD)))
        return y_BTF


class NormedOutput(nn.Module):
    """W_out ((norm(o) + r) * act(W_gate x)), the norm over each head or, with `joint`, over all at once.

    r, where it is given, is what no norm sees. With `own` the gate is the sigmoid of what it gates. With `least` the
    norm divides o by its last column, which is at least that.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        value_dim: int,
        norm: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None,
        rank: int | None = None,
        joint: bool = False,
        inner: bool = False,
        own: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.own = own
        self.joint = joint
        self.activation = activation
        self.gate = None if activation is None else gate_of(width, heads * value_dim, rank, inner)
        self.out = Dense(heads * value_dim, width, bias=False)

    def forward(
        self,
        o_BTHV: Tensor,
        x_BTD: Tensor,
        late_BTHV: Tensor | None = None,
        logit_BTF: Tensor | None = None,
        least_BTH1: Tensor | None = None,
    ) -> Tensor:
        if self.joint:
            o_BTHV = o_BTHV.flatten(2)
        if self.norm is not None:
            is_whole = least_BTH1 is None
            o_BTHV = self.norm(o_BTHV) if is_whole else self.norm(o_BTHV, least_BTH1).to(x_BTD.dtype)
        if late_BTHV is not None:
            o_BTHV = o_BTHV + late_BTHV
        o_BTF = o_BTHV if self.joint else o_BTHV.flatten(2)
        if self.activation is not None and self.gate is not None:
            o_BTF = o_BTF * self.activation(self.gate(x_BTD) if logit_BTF is None else logit_BTF)
        elif self.own:
            o_BTF = silu(o_BTF)
        y: Tensor = self.out(o_BTF)
        return y


class GatedOutput(nn.Module):
    """W_out norm(o * act(W_gate x)), the norm over all heads at once; with `own` the gate is sigmoid(o)."""

    def __init__(
        self,
        width: int,
        heads: int,
        value_dim: int,
        norm: nn.Module,
        activation: Callable[[Tensor], Tensor] | None,
        rank: int | None = None,
        inner: bool = False,
        own: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.own = own
        self.activation = activation
        self.gate = None if activation is None else gate_of(width, heads * value_dim, rank, inner)
        self.out = Dense(heads * value_dim, width, bias=False)

    def forward(self, o_BTHV: Tensor, x_BTD: Tensor, *, logit_BTF: Tensor | None = None) -> Tensor:
        o_BTF = o_BTHV.flatten(2)
        if self.activation is not None and self.gate is not None:
            o_BTF = o_BTF * self.activation(self.gate(x_BTD) if logit_BTF is None else logit_BTF)
        elif self.own:
            o_BTF = silu(o_BTF)
        y: Tensor = self.out(self.norm(o_BTF))
        return y


def gate_of(width: int, channels: int, rank: int | None, inner: bool = False) -> nn.Module:
    """The projection in front of a gate's activation."""
    if inner and rank is not None:
        return InnerGate(width, channels, rank)
    return Dense(width, channels, bias=False) if rank is None else LowRankGate(width, channels, rank)
