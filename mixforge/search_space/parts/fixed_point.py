"""A dense recurrence as the fixed point of a selective scan that is applied a bounded number of times.

    y^0 = 0
    v_t = Q_t (u_t - y_t) + y_t                                 Q_t of (u_t, y_{t-1})
    B'_t = l2(B_t + W_B y_{t-1}),  C'_t = l2(C_t + W_C y_{t-1})
    y <- layer_norm(scan(v, dt, A, B', C', D))                  as often as `iterations`, all y of the time before

Q_t mixes channels; at a fixed point of norm 1 the transition of y is no longer diagonal.
    householder   Q = 1 - 2 alpha k k^T, k = l2(silu(W_k [u_t; y_{t-1}])), alpha = sigmoid(w [u_t; y_{t-1}] + b)
    kron          Q = 1 - 2 (diag(a) K_1) x (diag(b) K_2), K_i = rows of unit length of R R^T, R upper triangular,
                  silu(W [u_t; y_{t-1}]); a and b sigmoids of another product

Source: Movahedi et al. 2025 (arXiv 2503.10799), FP-Mamba-H and FP-Mamba-K as in its authors' code
(dr-faustus/fp-rnn, models/fp_mamba_block.py and models/mixer.py). Departures: the number of iterations is fixed, so
that a step is exact: decoding keeps a state for each iteration, not the one of the fixed point; gradients run through
all iterations, not through the last alone; there is no damping, and no weight normalisation of the projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.selective_scan import selective_scan_step
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.predecessor import shifted
from mixforge.search_space.parts.state_space import Selection, StateSpace, zero_state


class HouseholderMixer(nn.Module):
    """Q v with one reflection that can be damped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.direction = nn.Linear(2 * channels, channels, bias=False)
        self.strength = nn.Linear(2 * channels, 1)

    def forward(self, given: Tensor, v: Tensor) -> Tensor:
        """Parameters from given [..., 2F], applied to v [..., F]."""
        k = F.normalize(F.silu(self.direction(given)), dim=-1, eps=1e-5)
        return v - 2 * torch.sigmoid(self.strength(given)) * k * (k * v).sum(-1, keepdim=True)


class KroneckerMixer(nn.Module):
    """Q v with v as a matrix, which is multiplied from both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        rows, columns = kron_factors(channels)
        self.rows, self.columns = rows, columns
        self.triangles = nn.Linear(
            2 * channels, rows * (rows + 1) // 2 + columns * (columns + 1) // 2, bias=False
        )
        self.scales = nn.Linear(2 * channels, rows + columns)

    def forward(self, given: Tensor, v: Tensor) -> Tensor:
        """Parameters from given [..., 2F], applied to v [..., F]."""
        triangles = F.silu(self.triangles(given)).flatten(0, -2)
        scales = torch.sigmoid(self.scales(given)).flatten(0, -2)
        half = self.rows * (self.rows + 1) // 2
        first = unit_rows(triangles[:, :half], self.rows) * scales[:, : self.rows, None]
        second = unit_rows(triangles[:, half:], self.columns) * scales[:, self.rows :, None]
        matrix = v.reshape(-1, self.rows, self.columns).transpose(1, 2)
        mixed = torch.bmm(torch.bmm(second, matrix), first).transpose(1, 2).reshape(v.shape)
        return v - 2 * mixed


def unit_rows(values: Tensor, size: int) -> Tensor:
    """R R^T with rows of unit length [M, size, size], of R's upper triangle [M, size (size + 1) / 2]."""
    row, column = torch.triu_indices(size, size, device=values.device)
    upper = values.new_zeros(values.shape[0], size * size)
    upper = upper.index_copy(1, row * size + column, values).reshape(-1, size, size)
    return F.normalize(torch.bmm(upper, upper.transpose(1, 2)), dim=-1, eps=1e-5)


def kron_factors(channels: int) -> tuple[int, int]:
    """The two factors of `channels` that are nearest to each other, the smaller first."""
    rows = next(rows for rows in range(int(channels**0.5), 0, -1) if channels % rows == 0)
    return rows, channels // rows


class FixedPointScan(StateSpace):
    """`iterations` scans, each over what the one before has put out."""

    def __init__(
        self,
        channels: int,
        states: int,
        iterations: int,
        selection: Selection,
        mixer: HouseholderMixer | KroneckerMixer,
        has_gate: bool,
        operation: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.shape = (iterations, channels, states)
        self.operation = operation
        self.selection = selection
        self.mixer = mixer
        self.fed_back = nn.Linear(channels, 2 * states, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.to_gate = nn.Linear(channels, channels, bias=False) if has_gate else None

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "hidden": zero_state(batch, self.shape, device, dtype),
            # Each iteration's output of the last token.
            "outputs": torch.zeros(batch, *self.shape[:2], device=device, dtype=dtype),
        }

    def forward(
        self, u_BTF: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        part = self.selection
        selected = part(u_BTF)
        y_BTF = torch.zeros_like(u_BTF)
        past_BF = y_BTF[:, 0]
        hidden, outputs = [], []
        for turn in range(self.shape[0]):
            v_BTF, dt_BTF, b_BTN, c_BTN = self.mixed(u_BTF, y_BTF, shifted(y_BTF, past_BF), *selected)
            before = None if state is None else state["hidden"][:, turn]
            scanned, after = self.operation(v_BTF, dt_BTF, part.rates(), b_BTN, c_BTN, part.skip, before)
            y_BTF = self.norm(scanned)
            past_BF = torch.zeros_like(past_BF) if state is None else state["outputs"][:, turn]
            hidden.append(after)
            outputs.append(y_BTF[:, -1])
        feed = None if self.to_gate is None else self.to_gate(shifted(y_BTF, past_BF))
        return y_BTF, feed, {"hidden": torch.stack(hidden, 1), "outputs": torch.stack(outputs, 1)}

    def step(self, u_BF: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        part = self.selection
        selected = part(u_BF)
        y_BF = past_BF = torch.zeros_like(u_BF)
        for turn in range(self.shape[0]):
            v_BF, dt_BF, b_BN, c_BN = self.mixed(u_BF, y_BF, past_BF, *selected)
            before = state["hidden"][:, turn]
            scanned, after = selective_scan_step(v_BF, dt_BF, part.rates(), b_BN, c_BN, part.skip, before)
            if after is not before:
                before.copy_(after)
            y_BF = self.norm(scanned)
            past_BF = state["outputs"][:, turn].clone()
            state["outputs"][:, turn] = y_BF
        return y_BF, None if self.to_gate is None else self.to_gate(past_BF)

    def mixed(
        self, u: Tensor, y: Tensor, past: Tensor, dt: Tensor, b: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What one iteration scans: v, dt, B' and C'."""
        v = self.mixer(torch.cat([u, past], -1), u - y) + y
        b_fed, c_fed = exact(self.fed_back(past)).chunk(2, -1)
        return (
            v,
            dt,
            F.normalize(exact(b) + b_fed, dim=-1, eps=1e-5),
            F.normalize(exact(c) + c_fed, dim=-1, eps=1e-5),
        )
