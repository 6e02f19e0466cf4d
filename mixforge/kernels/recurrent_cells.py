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

The torch form walks forward with few operations a token, and back with fewer: every gradient of a token is linear in
those of its output and states, with factors that are made for all tokens at once; so is the gradient of R, in the end.

Source: Hochreiter and Schmidhuber 1997 with Gers et al. 2000; Cho et al. 2014 (arXiv 1406.1078), in torch's form; Beck et
al. 2024 (arXiv 2405.04517), equations 8 to 17 and appendix A.1. Gradients of R after the walk: Poeppel et al. 2024
(arXiv 2412.07752, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form

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
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(cell), cell]


def gru_advance(
    gates_HBF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, states: list[Tensor]
) -> list[Tensor]:
    """One token: the state [H, B, K] after it."""
    assert bias_HK is not None
    (hidden,) = states
    r, z, n = gates_HBF.chunk(3, -1)
    r_h, z_h, n_h = torch.bmm(hidden, recurrent_HKF).chunk(3, -1)
    n = torch.tanh(n + torch.sigmoid(r + r_h) * (n_h + bias_HK[:, None]))
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
    cell = keep * cell + enter * torch.tanh(z)
    total = keep * total + enter
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
    gates_BTHF: Tensor,
    recurrent_HKF: Tensor,
    bias_HK: Tensor | None,
    state_BSHK: Tensor | None,
) -> None:
    """Raise ValueError where the shapes do not fit."""
    if recurrent_HKF.dim() != 3 or recurrent_HKF.shape[2] != cell.gates * recurrent_HKF.shape[1]:
        raise ValueError(
            f"recurrent has shape {list(recurrent_HKF.shape)}; it must be [heads, dim, {cell.gates} dim]"
        )
    heads, dim, _ = recurrent_HKF.shape
    if gates_BTHF.dim() != 4 or gates_BTHF.shape[2:] != (heads, cell.gates * dim):
        raise ValueError(
            f"gates have shape {list(gates_BTHF.shape)}; with these matrices it must be "
            f"[batch, time, {heads}, {cell.gates * dim}]"
        )
    batch, length = gates_BTHF.shape[:2]
    if length == 0:
        raise ValueError(
            f"gates have a length of 0 (shape {list(gates_BTHF.shape)}); give at least one token"
        )
    if (bias_HK is not None) != cell.has_bias or (bias_HK is not None and bias_HK.shape != (heads, dim)):
        found = None if bias_HK is None else list(bias_HK.shape)
        raise ValueError(f"bias is {found}; it must be {[heads, dim] if cell.has_bias else None}")
    expected = (batch, len(cell.first), heads, dim)
    if state_BSHK is not None and state_BSHK.shape != expected:
        raise ValueError(f"state has shape {list(state_BSHK.shape)}; it must be {list(expected)}")


def lstm_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place."""
    return one_token(lstm_advance, LSTM, gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place."""
    return one_token(gru_advance, GRU, gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_step(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BHK, state_BSHK). Where gradients are off, the state is updated in place."""
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
    gates, recurrent, bias, state = by_heads(cell, gates_BHF[:, None], recurrent_HKF, bias_HK, state_BSHK)
    after = torch.stack(advance(gates[0], recurrent, bias, list(state.unbind(0)))).permute(2, 0, 1, 3)
    h_BHK = after[:, 0].to(gates_BHF.dtype)
    return h_BHK, after if torch.is_grad_enabled() else state_BSHK.copy_(after)


class LstmLoop(torch.autograd.Function):
    """(h_THBK, last states_SHBK) of gates_THBF, recurrent_HKF and states_SHBK, of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, gates_THBF: Tensor, recurrent_HKF: Tensor, states_SHBK: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        dim = recurrent_HKF.shape[1]
        hidden, cell = states_SHBK.unbind(0)
        acts_THBF = room(gates_THBF, keep, *gates_THBF.shape[1:])
        cell_THBK, tanh_THBK = (room(gates_THBF, keep, *hidden.shape) for _ in range(2))
        h_THBK = room(gates_THBF, True, *hidden.shape)
        gates, acts, cells, tanhs, outputs = (
            x.unbind(0) for x in (gates_THBF, acts_THBF, cell_THBK, tanh_THBK, h_THBK)
        )
        i, f, g, o = (part.unbind(0) for part in acts_THBF.chunk(4, -1))
        i_f = acts_THBF[..., : 2 * dim].unbind(0)
        for t in range(len(gates)):
            torch.baddbmm(gates[t], hidden, recurrent_HKF, out=acts[t])
            i_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], cell, out=cells[t]).addcmul_(i[t], g[t])
            cell = cells[t]
            torch.tanh(cell, out=tanhs[t])
            hidden = torch.mul(o[t], tanhs[t], out=outputs[t])
        ctx.save_for_backward(recurrent_HKF, states_SHBK, acts_THBF, cell_THBK, tanh_THBK, h_THBK)
        return h_THBK, torch.stack([hidden, cell])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_THBK: Tensor, dlast_SHBK: Tensor) -> tuple[Tensor | None, ...]:
        recurrent_HKF, states_SHBK, acts_THBF, cell_THBK, tanh_THBK, h_THBK = ctx.saved_tensors
        i, f, g, o = acts_THBF.chunk(4, -1)
        past_THBK = before(states_SHBK[1], cell_THBK)
        # What the gates i, f and g get of the cell's gradient, o and the cell of the output's.
        to_gates = torch.stack([g * i * (1 - i), past_THBK * f * (1 - f), i * (1 - g * g)], -2).unbind(0)
        to_o, to_cell = (h_THBK * (1 - o)).unbind(0), (o * (1 - tanh_THBK * tanh_THBK)).unbind(0)
        kept, dout = f.unbind(0), dh_THBK.unbind(0)
        dgates_THBF, dgates, split = by_gates(acts_THBF, 4)
        difg, do = split[..., :3, :].unbind(0), split[..., 3, :].unbind(0)
        dh, dcell = dlast_SHBK[0], dlast_SHBK[1].clone()
        back = recurrent_HKF.transpose(1, 2)
        for t in reversed(range(len(dout))):
            dh = dh + dout[t]
            dcell.addcmul_(dh, to_cell[t])
            torch.mul(to_gates[t], dcell.unsqueeze(-2), out=difg[t])
            torch.mul(dh, to_o[t], out=do[t])
            dcell.mul_(kept[t])
            dh = torch.bmm(dgates[t], back)
        drecurrent = of_matrices(before(states_SHBK[0], h_THBK), dgates_THBF)
        return dgates_THBF, drecurrent, torch.stack([dh, dcell]), None


class GruLoop(torch.autograd.Function):
    """(h_THBK, last states_SHBK) of gates_THBF, recurrent_HKF, bias_HK and states_SHBK, of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, gates_THBF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor, states_SHBK: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        dim = recurrent_HKF.shape[1]
        hidden = states_SHBK[0]
        acts_THBF = room(gates_THBF, keep, *gates_THBF.shape[1:])
        n_THBK, h_THBK = (room(gates_THBF, is_kept, *hidden.shape) for is_kept in (keep, True))
        given, n_given = (part.unbind(0) for part in gates_THBF.split_with_sizes([2 * dim, dim], -1))
        acts, n, outputs = (x.unbind(0) for x in (acts_THBF, n_THBK, h_THBK))
        r, z, n_h = (part.unbind(0) for part in acts_THBF.chunk(3, -1))
        r_z = acts_THBF[..., : 2 * dim].unbind(0)
        bias_H1K = bias_HK[:, None]
        for t in range(len(given)):
            torch.bmm(hidden, recurrent_HKF, out=acts[t])
            r_z[t].add_(given[t]).sigmoid_()
            n_h[t].add_(bias_H1K)
            torch.addcmul(n_given[t], r[t], n_h[t], out=n[t]).tanh_()
            hidden = torch.lerp(n[t], hidden, z[t], out=outputs[t])
        ctx.save_for_backward(recurrent_HKF, states_SHBK, acts_THBF, n_THBK, h_THBK)
        return h_THBK, hidden[None].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_THBK: Tensor, dlast_SHBK: Tensor) -> tuple[Tensor | None, ...]:
        recurrent_HKF, states_SHBK, acts_THBF, n_THBK, h_THBK = ctx.saved_tensors
        dim = recurrent_HKF.shape[1]
        r, z, n_h = acts_THBF.chunk(3, -1)
        past_THBK = before(states_SHBK[0], h_THBK)
        to_n = (1 - z) * (1 - n_THBK * n_THBK)
        to_r = to_n * n_h * r * (1 - r)
        to_own = torch.stack([to_r, (past_THBK - n_THBK) * z * (1 - z), to_n * r], -2).unbind(0)
        # Of what R and the bias give r, z and n.
        down_THBF, down, split = by_gates(acts_THBF, 3)
        total_THBK = torch.empty_like(h_THBK)
        downs, totals, kept, dout = split.unbind(0), total_THBK.unbind(0), z.unbind(0), dh_THBK.unbind(0)
        dh, back = dlast_SHBK[0], recurrent_HKF.transpose(1, 2)
        for t in reversed(range(len(dout))):
            torch.add(dh, dout[t], out=totals[t])
            torch.mul(to_own[t], totals[t].unsqueeze(-2), out=downs[t])
            dh = torch.baddbmm(totals[t] * kept[t], down[t], back)
        dgates_THBF = torch.cat([down_THBF[..., : 2 * dim], total_THBK * to_n], -1)
        dbias_HK = down_THBF[..., 2 * dim :].sum((0, 2))
        return dgates_THBF, of_matrices(past_THBK, down_THBF), dbias_HK, dh[None], None


class SlstmLoop(torch.autograd.Function):
    """(h_THBK, last states_SHBK) of gates_THBF, recurrent_HKF and states_SHBK, of one dtype. P is two: c, n or i', f'."""

    @staticmethod
    def forward(
        ctx: Any, gates_THBF: Tensor, recurrent_HKF: Tensor, states_SHBK: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, sums, largest = states_SHBK[0], states_SHBK[1:3], states_SHBK[3]
        acts_THBF = room(gates_THBF, keep, *gates_THBF.shape[1:])
        sums_TPHBK, scale_TPHBK = (room(gates_THBF, keep, 2, *hidden.shape) for _ in range(2))
        h_THBK = room(gates_THBF, True, *hidden.shape)
        gates, acts, both, scale, outputs = (
            x.unbind(0) for x in (gates_THBF, acts_THBF, sums_TPHBK, scale_TPHBK, h_THBK)
        )
        i, f, z, o = (part.unbind(0) for part in acts_THBF.chunk(4, -1))
        for t in range(len(gates)):
            torch.baddbmm(gates[t], hidden, recurrent_HKF, out=acts[t])
            lasting = F.logsigmoid(f[t]).add_(largest)
            largest = torch.maximum(lasting, i[t])
            entering, kept = scale[t].unbind(0)
            torch.sub(i[t], largest, out=entering)
            torch.sub(lasting, largest, out=kept)
            scale[t].exp_()
            z[t].tanh_()
            o[t].sigmoid_()
            sums = torch.mul(sums, kept, out=both[t])
            cell, total = sums.unbind(0)
            cell.addcmul_(entering, z[t])
            total.add_(entering)
            hidden = torch.mul(o[t], cell, out=outputs[t]).div_(total)
        ctx.save_for_backward(recurrent_HKF, states_SHBK, acts_THBF, scale_TPHBK, sums_TPHBK, h_THBK)
        return h_THBK, torch.cat([hidden[None], sums, largest[None]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_THBK: Tensor, dlast_SHBK: Tensor) -> tuple[Tensor | None, ...]:
        recurrent_HKF, states_SHBK, acts_THBF, scale_TPHBK, sums_TPHBK, h_THBK = ctx.saved_tensors
        _, f, z, o = acts_THBF.chunk(4, -1)
        entering, lasting = scale_TPHBK.unbind(1)
        slope = lasting * torch.sigmoid(-f)
        past_c, past_n = before(states_SHBK[1:3], sums_TPHBK).unbind(1)
        # What the gates i, f and z get of the gradients of c and n, these and o of the output's.
        of_c = torch.stack([entering * z, slope * past_c, entering * (1 - z * z)], -2).unbind(0)
        of_n = torch.stack([entering, slope * past_n], -2).unbind(0)
        to_sums = torch.stack([o, -h_THBK], 1).div_(sums_TPHBK[:, 1:]).unbind(0)
        to_o, kept, dout = (h_THBK * (1 - o)).unbind(0), lasting.unbind(0), dh_THBK.unbind(0)
        dgates_THBF, dgates, split = by_gates(acts_THBF, 4)
        difz, dif, do = (part.unbind(0) for part in (split[..., :3, :], split[..., :2, :], split[..., 3, :]))
        dh, dsums = dlast_SHBK[0], dlast_SHBK[1:3].clone()
        dcell, dtotal = dsums.unsqueeze(-2).unbind(0)
        back = recurrent_HKF.transpose(1, 2)
        for t in reversed(range(len(dout))):
            dh = dh + dout[t]
            dsums.addcmul_(dh, to_sums[t])
            torch.mul(of_c[t], dcell, out=difz[t])
            dif[t].addcmul_(of_n[t], dtotal)
            torch.mul(dh, to_o[t], out=do[t])
            dsums.mul_(kept[t])
            dh = torch.bmm(dgates[t], back)
        drecurrent = of_matrices(before(states_SHBK[0], h_THBK), dgates_THBF)
        # Of the m before the first token: the others are constants.
        dlargest = (dsums * states_SHBK[1:3]).sum(0)
        return dgates_THBF, drecurrent, torch.cat([dh[None], dsums, dlargest[None]]), None


def room(like: Tensor, keep: bool, *shape: int) -> Tensor:
    """Room for a value of each token, or of one token at a time."""
    length = like.shape[0]
    return like.new_empty(length if keep else 1, *shape).expand(length, *shape)


def by_gates(like_THBF: Tensor, gates: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Room for gradients of gates: all, token by token, and with an axis of the gates."""
    made = torch.empty_like(like_THBF)
    return made, made.unbind(0), made.view(*made.shape[:-1], gates, -1)


def before(first: Tensor, values_T: Tensor) -> Tensor:
    """What each token finds: the value of the token before it."""
    return torch.cat([first[None], values_T[:-1]])


def of_matrices(past_THBK: Tensor, given_THBF: Tensor) -> Tensor:
    """The gradient of the recurrent matrices [H, K, F], by one product over all tokens."""
    past_HKN = past_THBK.permute(1, 3, 0, 2).flatten(2)
    return torch.bmm(past_HKN, given_THBF.transpose(0, 1).flatten(1, 2))


def lstm_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `lstm_reference`, with its derivative written out."""
    gates, recurrent, _, state = by_heads(LSTM, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    results = LstmLoop.apply(gates, recurrent, state, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return by_batch(results, gates_BTHF.dtype)


def gru_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gru_reference`, with its derivative written out."""
    gates, recurrent, bias, state = by_heads(GRU, gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    results = GruLoop.apply(gates, recurrent, bias, state, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return by_batch(results, gates_BTHF.dtype)


def slstm_torch(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `slstm_reference`, with its derivative written out."""
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
