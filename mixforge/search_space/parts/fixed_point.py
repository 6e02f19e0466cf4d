"""A dense recurrence as the fixed point of a selective scan that is applied a bounded number of times.

    y^0 = 0
    v_t = Q_t (u_t - y_t) + y_t                                 Q_t of (u_t, y_{t-1})
    B'_t = l2(B_t + W_B y_{t-1}),  C'_t = l2(C_t + W_C y_{t-1})
    y <- layer_norm(scan(v, dt, A, B', C', D))                  as often as `iterations`, all y of the time before

    Q_t = 1 - 2 alpha k k^T,  k = l2(silu(W_k [u_t; y_{t-1}])),  alpha = sigmoid(w [u_t; y_{t-1}] + b)

Q_t mixes channels: the transition of y at a fixed point is no longer diagonal.

Source: Movahedi et al. 2025 (arXiv 2503.10799), FP-Mamba-H as in its authors' code (dr-faustus/fp-rnn,
models/fp_mamba_block.py and models/mixer.py, one reflection). Departures: the number of iterations is fixed, so
that a step is exact: decoding keeps a state for each iteration, not the one of the fixed point; gradients run through
all iterations, not through the last alone; there is no damping, and no weight normalisation of the projections. Their
Kronecker mixer is left out: see docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.predecessor import shifted
from mixforge.search_space.parts.state_space import Selection, StateSpace, zero_state


class HouseholderMixer(nn.Module):
    """Q v with one reflection that can be damped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.direction = Dense(2 * channels, channels, bias=False)
        self.strength = Dense(2 * channels, 1)

    def forward(self, given: Tensor, v: Tensor) -> Tensor:
        """Parameters from given [..., 2F], applied to v [..., F]."""
        k = F.normalize(F.silu(product(self.direction, given)), dim=-1, eps=1e-5)
        return v - 2 * torch.sigmoid(product(self.strength, given)) * k * (k * v).sum(-1, keepdim=True)


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """A projection in the dtype of x, which the iterations keep at float32 or better."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


class FixedPointScan(StateSpace):
    """`iterations` scans, each over what the one before has put out.

    Iterates are float32 or better: they feed on each other, and directions of vectors jump where those are short.
    """

    def __init__(
        self,
        channels: int,
        states: int,
        iterations: int,
        selection: Selection,
        mixer: HouseholderMixer,
        has_gate: bool,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.shape = (iterations, channels, states)
        self.operation = operation
        self.one_step = one_step
        self.selection = selection
        self.mixer = mixer
        self.fed_back = Dense(channels, 2 * states, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.to_gate = Dense(channels, channels, bias=False) if has_gate else None

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "hidden": zero_state(batch, self.shape, device, dtype),
            # Each iteration's output of the last token.
            "outputs": zero_state(batch, self.shape[:2], device, dtype),
        }

    def forward(
        self, u_BTF: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        part = self.selection
        selected = part(u_BTF)
        dtype, u_BTF = u_BTF.dtype, exact(u_BTF)
        y_BTF = torch.zeros_like(u_BTF)
        past_BF = y_BTF[:, 0]
        hidden, outputs = [], []
        for turn in range(self.shape[0]):
            v_BTF, dt_BTF, b_BTN, c_BTN = self.mixed(u_BTF, y_BTF, shifted(y_BTF, past_BF), *selected)
            before = None if state is None else state["hidden"][:, turn]
            scanned, after = self.operation(v_BTF, dt_BTF, part.rates(), b_BTN, c_BTN, part.skip, before)
            y_BTF = self.normed(scanned)
            past_BF = torch.zeros_like(past_BF) if state is None else state["outputs"][:, turn]
            hidden.append(after)
            outputs.append(y_BTF[:, -1])
        feed = None if self.to_gate is None else self.to_gate(shifted(y_BTF, past_BF).to(dtype))
        return y_BTF.to(dtype), feed, {"hidden": torch.stack(hidden, 1), "outputs": torch.stack(outputs, 1)}

    def step(self, u_BF: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        part = self.selection
        selected = part(u_BF)
        dtype, u_BF = u_BF.dtype, exact(u_BF)
        y_BF = past_BF = torch.zeros_like(u_BF)
        for turn in range(self.shape[0]):
            v_BF, dt_BF, b_BN, c_BN = self.mixed(u_BF, y_BF, past_BF, *selected)
            kept = state["hidden"][:, turn]
            before = kept.contiguous()
            scanned, after = self.one_step(v_BF, dt_BF, part.rates(), b_BN, c_BN, part.skip, before)
            if after is not kept:
                kept.copy_(after)
            y_BF = self.normed(scanned)
            past_BF = state["outputs"][:, turn].clone()
            state["outputs"][:, turn] = y_BF
        return y_BF.to(dtype), None if self.to_gate is None else self.to_gate(past_BF.to(dtype))

    def normed(self, scanned: Tensor) -> Tensor:
        """The output of one iteration."""
        weight, bias = self.norm.weight.to(scanned.dtype), self.norm.bias.to(scanned.dtype)
        return F.layer_norm(scanned, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def mixed(
        self, u: Tensor, y: Tensor, past: Tensor, dt: Tensor, b: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What one iteration scans: v, dt, B' and C'."""
        v = self.mixer(torch.cat([u, past], -1), u - y) + y
        b_fed, c_fed = product(self.fed_back, past).chunk(2, -1)
        return (
            v,
            dt,
            F.normalize(exact(b) + b_fed, dim=-1, eps=1e-5),
            F.normalize(exact(c) + c_fed, dim=-1, eps=1e-5),
        )
