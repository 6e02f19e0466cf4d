"""Recurrences whose gates see the last output: LSTM, GRU and sLSTM, with a recurrent matrix for each head.

x_t is what the input gives the gates; h_{t-1} R is added to it, or for n of a GRU behind its reset gate:

    lstm    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t)                   gates i, f, g, o
    gru     n_t = tanh(n + sigmoid(r) (R_n h_{t-1} + b)),  h_t = (1 - sigmoid(z)) n_t + sigmoid(z) h_{t-1}  gates r, z, n
    slstm   m_t = max(log sigmoid(f) + m_{t-1}, i),  f' = exp(log sigmoid(f) + m_{t-1} - m_t),  i' = exp(i - m_t)
            c_t = f' c_{t-1} + i' tanh(z),  n_t = f' n_{t-1} + i',  h_t = sigmoid(o) c_t / n_t           gates i, f, z, o

All forms take gates_BTHF [B, T, H, G K], the matrices recurrent_HKF [H, K, G K], of a GRU the bias_HK, and the states
state_BSHK before the first token, the output first; None is none. They return the outputs h_BTHK in the dtype of the
gates and the last states in float32, or float64 where the gates are. No output depends on m_t, so no gradient goes
through it.

Source: Hochreiter and Schmidhuber 1997 with Gers et al. 2000; Cho et al. 2014 (arXiv 1406.1078), in torch's form; Beck et
al. 2024 (arXiv 2405.04517), equations 8 to 17 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import check_alike, check_axes, check_shape
from mixforge.kernels.recurrent_loops import GruLoop, LstmLoop, SlstmLoop

# The exponent of a sum without terms. It is finite so that differences of two are.
EMPTY = -1e30


class Cell(NamedTuple):
    """A cell's gates, and what its states are before the first token, the output first."""

    gates: int
    first: tuple[float, ...]
    has_bias: bool = False


LSTM = Cell(4, (0.0, 0.0))
GRU = Cell(3, (0.0,), has_bias=True)
SLSTM = Cell(4, (0.0, 0.0, 0.0, EMPTY))


def lstm_advance(
    gates_HBF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, states: list[Tensor]
) -> list[Tensor]:
    """One token: the states [H, B, K] after it."""
    hidden, cell = states
    i, f, g, o = torch.baddbmm(gates_HBF, hidden, recurrent_HKF).chunk(4, -1)
    cell = torch.addcmul(torch.sigmoid(f) * cell, torch.sigmoid(i), torch.tanh(g))
    return [torch.sigmoid(o) * torch.tanh(cell), cell]


def gru_advance(
    gates_HBF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, states: list[Tensor]
) -> list[Tensor]:
    """One token: the state [H, B, K] after it."""
    assert bias_HK is not None
    (hidden,) = states
    r, z, n = gates_HBF.chunk(3, -1)
    r_h, z_h, n_h = torch.bmm(hidden, recurrent_HKF).chunk(3, -1)
    n = torch.tanh(torch.addcmul(n, torch.sigmoid(r + r_h), n_h + bias_HK[:, None]))
    return [torch.lerp(n, hidden, torch.sigmoid(z + z_h))]


def slstm_advance(
    gates_HBF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, states: list[Tensor]
) -> list[Tensor]:
    """One token: the states [H, B, K] after it."""
    hidden, cell, total, largest = states
    i, f, z, o = torch.baddbmm(gates_HBF, hidden, recurrent_HKF).chunk(4, -1)
    kept = F.logsigmoid(f) + largest
    top = torch.maximum(kept, i).detach()
    keep, enter = torch.exp(kept - top), torch.exp(i - top)
    cell = torch.addcmul(keep * cell, enter, torch.tanh(z))
    total = torch.addcmul(enter, keep, total)
    return [torch.sigmoid(o) * cell / total, cell, total, top]


def lstm_reference(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other: (h_BTHK, the last state_BSHK)."""
    return one_by_one(lstm_advance, LSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_reference(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other: (h_BTHK, the last state_BSHK)."""
    return one_by_one(gru_advance, GRU, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_reference(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other: (h_BTHK, the last state_BSHK)."""
    return one_by_one(slstm_advance, SLSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def one_by_one(
    advance: Callable[..., list[Tensor]],
    cell: Cell,
    gates_BTHF: Tensor,
    recurrent_HKF: Tensor,
    bias_HK: Tensor | None,
    state_BSHK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A sequence by a cell's `advance`."""
    gates, recurrent, bias, state = by_heads(cell, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    states, outputs = list(state.unbind(0)), []
    for gates_HBF in gates.unbind(0):
        states = advance(gates_HBF, recurrent, bias, states)
        outputs.append(states[0])
    h_THBK = torch.stack(outputs)
    return h_THBK.permute(2, 0, 1, 3).to(gates_BTHF.dtype), torch.stack(states, 0).permute(2, 0, 1, 3)


def by_heads(
    cell: Cell,
    gates_BTHF: Tensor,
    recurrent_HKF: Tensor,
    bias_HK: Tensor | None,
    state_BSHK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(gates_THBF, recurrent_HKF, bias_HK, state_SHBK) in float32 or float64, for products of all heads at once."""
    check_cell(cell, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    dtype = torch.float64 if gates_BTHF.dtype == torch.float64 else torch.float32
    if state_BSHK is None:
        state_BSHK = first_state(cell, gates_BTHF, recurrent_HKF)
    return (
        gates_BTHF.to(dtype).permute(1, 2, 0, 3),
        recurrent_HKF.to(dtype),
        None if bias_HK is None else bias_HK.to(dtype),
        state_BSHK.to(dtype).permute(1, 2, 0, 3),
    )


def first_state(cell: Cell, gates_BTHF: Tensor, recurrent_HKF: Tensor) -> Tensor:
    """The states before the first token."""
    dtype = torch.float64 if gates_BTHF.dtype == torch.float64 else torch.float32
    shape = (gates_BTHF.shape[0], len(cell.first), *recurrent_HKF.shape[:2])
    state_BSHK = gates_BTHF.new_zeros(shape, dtype=dtype)
    for number, value in enumerate(cell.first):
        if value != 0:
            state_BSHK[:, number] = value
    return state_BSHK


def check_cell(
    cell: Cell,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit."""
    check_axes("recurrent", recurrent, f"heads, dim, {cell.gates} dim")
    heads, dim, _ = recurrent.shape
    check_shape("recurrent", recurrent, (heads, dim, cell.gates * dim))
    check_axes("gates", gates, "batch, heads, gates" if is_step else "batch, time, heads, gates")
    *lead, _, _ = gates.shape
    check_shape("gates", gates, (*lead, heads, cell.gates * dim))
    if bias is not None and not cell.has_bias:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be None")
    check_shape("bias", bias, (heads, dim), is_needed=cell.has_bias)
    check_shape("state", state, (lead[0], len(cell.first), heads, dim), is_needed=is_step)
    check_alike(gates=gates, recurrent=recurrent, bias=bias, state=state)


def lstm_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    return one_token(lstm_advance, LSTM, gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    return one_token(gru_advance, GRU, gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    return one_token(slstm_advance, SLSTM, gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def one_token(
    advance: Callable[..., list[Tensor]],
    cell: Cell,
    gates_BHF: Tensor,
    recurrent_HKF: Tensor,
    bias_HK: Tensor | None,
    state_BSHK: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token by a cell's `advance`."""
    check_cell(cell, gates_BHF, recurrent_HKF, bias_HK, state_BSHK, is_step=True)
    dtype = state_BSHK.dtype
    states = [state_BHK.transpose(0, 1) for state_BHK in state_BSHK.unbind(1)]
    bias = None if bias_HK is None else bias_HK.to(dtype)
    after = advance(gates_BHF.to(dtype).transpose(0, 1), recurrent_HKF.to(dtype), bias, states)
    h_BHK = after[0].transpose(0, 1).to(gates_BHF.dtype)
    if torch.is_grad_enabled():
        return h_BHK, torch.stack(after).permute(2, 0, 1, 3)
    for held, new in zip(states, after, strict=True):
        held.copy_(new)
    return h_BHK, state_BSHK


def lstm_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `lstm_reference`, with its derivative written out."""
    # A compiler writes one of its own, and makes wrong numbers of results that are written into views.
    if torch.compiler.is_compiling():
        return one_by_one(lstm_advance, LSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    gates, recurrent, _, state = by_heads(LSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    results = LstmLoop.apply(gates, recurrent, state, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return by_batch(results, gates_BTHF.dtype)


def gru_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gru_reference`, with its derivative written out."""
    # A compiler writes one of its own, and makes wrong numbers of results that are written into views.
    if torch.compiler.is_compiling():
        return one_by_one(gru_advance, GRU, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    gates, recurrent, bias, state = by_heads(GRU, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    results = GruLoop.apply(gates, recurrent, bias, state, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return by_batch(results, gates_BTHF.dtype)


def slstm_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `slstm_reference`, with its derivative written out."""
    # A compiler writes one of its own, and makes wrong numbers of results that are written into views.
    if torch.compiler.is_compiling():
        return one_by_one(slstm_advance, SLSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    gates, recurrent, _, state = by_heads(SLSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    results = SlstmLoop.apply(gates, recurrent, state, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return by_batch(results, gates_BTHF.dtype)


def by_batch(results: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(h_BTHK in a dtype, the last state_BSHK)."""
    h_THBK, last_SHBK = results
    return h_THBK.permute(2, 0, 1, 3).to(dtype), last_SHBK.permute(2, 0, 1, 3)


CELLS = {"lstm": LSTM, "gru": GRU, "slstm": SLSTM}
FORMS: dict[str, dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "reference": {"lstm": lstm_reference, "gru": gru_reference, "slstm": slstm_reference},
    "torch": {"lstm": lstm_torch, "gru": gru_torch, "slstm": slstm_torch},
}
_STEPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "slstm": slstm_step,
}


def form(backend: str, cell: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A cell's form of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("recurrent_cells", f"{cell}_triton")
        return found
    return FORMS[backend][cell]


def step_form(backend: str, cell: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A cell's step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("recurrent_cells", f"{cell}_step_triton")
        return found
    return _STEPS[cell]
