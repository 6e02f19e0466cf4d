"""Triton form of the recurrent cells: `recurrent_cells` has the equations.

A program walks all tokens of BLOCK_B sequences of one head. Where the head is narrow enough, its recurrent matrices are
read once and stay in registers or shared memory, as are its states (`cell_forward`); a wider one reads the matrices
again for each token, in blocks, from the cache that all programs share, and leaves its states in memory between tokens
(`cell_forward_wide`). What the input gives the gates of all tokens was multiplied before, and is read one token ahead.

For the backward pass, the gates' values and the sums c and n of each token are kept in float32. It walks from the last
token to the first and leaves the gradients of what R and the input give the gates; those of R and b are products and
sums over all tokens, made by torch afterwards, in a fixed order.

Source: Poeppel et al. 2024 (arXiv 2412.07752, section 3): states and matrices on chip for all tokens, one head a
program, gradients of matrices afterwards. Departures: a head wider than that is not cut over several programs.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mixforge.kernels.blocks import CONSUMER, choose
from mixforge.kernels.launch import (
    check_dtypes,
    check_runs,
    check_state,
    dot_precision,
    generation,
    launch,
    on_device,
)
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.recurrent_cells import CELLS, check_cell, first_state
from mixforge.kernels.recurrent_cells_backward_triton import cell_backward, cell_backward_wide
from mixforge.kernels.recurrent_cells_forward_triton import cell_forward, cell_forward_wide

# Channels of a head whose matrices are held, by the bytes of a number.
HELD = {2: 128, 4: 64}
# Gates' values and sums of a token that backward reads.
KEPT = {"lstm": 5, "gru": 4, "slstm": 7}


def padded(dim: int) -> int:
    """The side of a head's tiles: products take 16 at least."""
    return max(16, int(triton.next_power_of_2(dim)))


def run_forward(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last states, and what backward reads, which is empty where it is not kept."""
    h, final, kept = empty_forward(cell, gates, recurrent, bias, state, keep)
    launch_forward(cell, gates, recurrent, bias, state, h, final, kept if keep else None)
    return h, final, kept


def launch_forward(
    cell: str,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    h: Tensor,
    final: Tensor,
    kept: Tensor | None,
) -> None:
    """Write h, the last states and what is kept. `final` may be `state`."""
    batch, length = gates.shape[:2]
    heads, dim = recurrent.shape[:2]
    if is_held(gates.dtype, dim):
        config = choose("cell_forward", generation(), gates.dtype, key=dim)
        launch(
            cell_forward, (heads, -(-batch // config.blocks["BLOCK_B"])),
            gates, recurrent, bias, state, h, final, kept, length, batch,
            config=config, WIDE=padded(dim), **constants(cell, recurrent),
        )  # fmt: skip
        return
    config = choose("cell_forward_wide", generation(), gates.dtype, key=dim)
    # The columns of a single token wait for no others.
    blocks = -(-dim // config.blocks["BLOCK_K"])
    each = 1 if length == 1 else blocks
    outputs = h.new_empty(batch, length + 1, heads, dim)
    outputs[:, 0] = state[:, 0]
    if final is not state:
        final.copy_(state)
    launch(
        cell_forward_wide, (heads, -(-batch // config.blocks["BLOCK_B"]), -(-blocks // each)),
        gates, recurrent, bias, outputs, final, kept, length, batch, each,
        config=config, **constants(cell, recurrent),
    )  # fmt: skip
    h.copy_(outputs[:, 1:])


def is_held(dtype: torch.dtype, dim: int) -> bool:
    """Whether the matrices of a head are held for all tokens: half as wide ones where shared memory is half."""
    return dim <= HELD[dtype.itemsize] // (2 if generation().startswith(CONSUMER) else 1)


def constants(cell: str, recurrent: Tensor) -> dict[str, Any]:
    """What is known of both passes when they are compiled."""
    heads, dim = recurrent.shape[:2]
    return {
        "heads": heads,
        "dim": dim,
        "CELL": cell,
        "STATES": len(CELLS[cell].first),
        "KEPT": KEPT[cell],
        "PRECISION": dot_precision(recurrent.dtype),
    }


def empty_forward(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last states and what is kept, not yet written."""
    batch, length, heads, _ = gates.shape
    dim = recurrent.shape[1]
    kept = (batch, length, heads, KEPT[cell], dim) if keep else (0,)
    return (
        gates.new_empty(batch, length, heads, dim),
        torch.empty_like(state),
        gates.new_empty(kept, dtype=torch.float32),
    )


def run_backward(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates, of what R and b give n of a GRU (otherwise empty), and of the first states."""
    dgates, down, dstate = empty_backward(cell, recurrent, state, h, kept, dh, dfinal)
    batch, length, heads, dim = h.shape
    of_n = down if cell == "gru" else None
    if is_held(h.dtype, dim):
        config = choose("cell_backward", generation(), h.dtype, key=dim)
        launch(
            cell_backward, (heads, -(-batch // config.blocks["BLOCK_B"])),
            recurrent, state, h, kept, dh, dfinal, dgates, of_n, dstate, length, batch,
            config=config, WIDE=padded(dim), **constants(cell, recurrent),
        )  # fmt: skip
        return dgates, down, dstate
    config = choose("cell_backward_wide", generation(), h.dtype, key=dim)
    if dfinal is None:
        dstate.zero_()
    else:
        dstate.copy_(dfinal)
    launch(
        cell_backward_wide, (heads, -(-batch // config.blocks["BLOCK_B"])),
        recurrent, state, h, kept, dh, dgates, of_n, dstate, length, batch,
        config=config, **constants(cell, recurrent),
    )  # fmt: skip
    return dgates, down, dstate


def empty_backward(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, not yet written."""
    dgates = h.new_empty(*h.shape[:3], recurrent.shape[2])
    return dgates, torch.empty_like(h) if cell == "gru" else h.new_empty(0), torch.empty_like(state)


_forward = torch.library.custom_op(
    "mixforge::recurrent_cell_forward", on_device(run_forward), mutates_args=()
)


_backward = torch.library.custom_op(
    "mixforge::recurrent_cell_backward", on_device(run_backward), mutates_args=()
)


@_forward.register_fake
def _(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    made = run_forward if gates.device.type == "meta" else empty_forward
    return made(cell, gates, recurrent, bias, state, keep)


@_backward.register_fake
def _(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    made = run_backward if h.device.type == "meta" else empty_backward
    return made(cell, recurrent, state, h, kept, dh, dfinal)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.cell, _, recurrent, bias, state, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(recurrent, state, output[0], output[2])
    # A gradient of what is kept would be as large as it is, and zero.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    recurrent, state, h, kept = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dgates, down, dstate = _backward(ctx.cell, recurrent, state, h, kept, dh, dfinal)
    past_HKN = torch.cat([state[:, :1].to(h.dtype), h[:, :-1]], 1).permute(2, 3, 0, 1).flatten(2)
    given, dbias = dgates, None
    if ctx.bias_dtype is not None:
        given = torch.cat([dgates[..., : 2 * h.shape[3]], down], -1)
        dbias = down.sum((0, 1), dtype=torch.float32).to(ctx.bias_dtype)
    drecurrent = torch.bmm(past_HKN, given.permute(2, 0, 1, 3).flatten(1, 2))
    return None, dgates, drecurrent, dbias, dstate, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def run_step(cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """h of one token; the state, which must be contiguous, is brought up to date in place."""
    h = gates.new_empty(gates.shape[0], *recurrent.shape[:2])
    launch_forward(cell, gates[:, None], recurrent, bias, state, h[:, None], state, None)
    return h


_step = torch.library.custom_op("mixforge::recurrent_cell_step", on_device(run_step), mutates_args=("state",))


@_step.register_fake
def _(cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    if gates.device.type == "meta":
        return run_step(cell, gates, recurrent, bias, state)
    return gates.new_empty(gates.shape[0], *recurrent.shape[:2])


def run(
    cell: str, gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A sequence of a cell by its name."""
    check_cell(CELLS[cell], gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    check_runs("gates", gates_BTHF)
    check_dtypes(gates=gates_BTHF)
    if state_BSHK is None:
        state_BSHK = first_state(CELLS[cell], gates_BTHF, recurrent_HKF)
    keep = wants_gradient(gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    weights = prepared(gates_BTHF, recurrent_HKF, bias_HK)
    h_BTHK, final_BSHK, _ = _forward(cell, *weights, state_BSHK.float().contiguous(), keep)
    return h_BTHK, final_BSHK


def run_token(
    cell: str, gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of a cell by its name: in place, or where a gradient is wanted, as a sequence of one."""
    check_cell(CELLS[cell], gates_BHF, recurrent_HKF, bias_HK, state_BSHK, is_step=True)
    check_runs("gates", gates_BHF)
    check_dtypes(gates=gates_BHF)
    if wants_gradient(gates_BHF, recurrent_HKF, bias_HK, state_BSHK):
        h_BTHK, final_BSHK = run(cell, gates_BHF[:, None], recurrent_HKF, bias_HK, state_BSHK)
        return h_BTHK[:, 0], final_BSHK
    check_state(state_BSHK)
    h_BHK: Tensor = _step(cell, *prepared(gates_BHF, recurrent_HKF, bias_HK), state_BSHK)
    return h_BHK, state_BSHK


def prepared(gates: Tensor, recurrent: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous, the matrices in the dtype of the gates."""
    bias = None if bias is None else bias.contiguous()
    return gates.contiguous(), recurrent.to(gates.dtype).contiguous(), bias


def lstm_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `lstm_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("lstm", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gru_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("gru", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `slstm_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("slstm", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def lstm_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `lstm_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("lstm", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `gru_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("gru", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `slstm_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("slstm", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)
