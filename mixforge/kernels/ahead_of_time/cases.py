"""What the gate compiles and the tuner tunes: every operation in every template, at the dims that matter.

A case stands for a shape class, not for a length, so one length is enough. The sizes are those of the benchmarks, so
that bytes can be read beside times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels import recurrent_cells
from mixforge.kernels.ahead_of_time.case import Call, Case
from mixforge.kernels.chunked_linear import chunked_linear_reference
from mixforge.kernels.chunked_linear_step_triton import linear_step_triton
from mixforge.kernels.chunked_linear_triton import chunked_linear_triton
from mixforge.kernels.diagonal_ssm_step_triton import diagonal_ssm_step_triton
from mixforge.kernels.dplr import dplr_reference
from mixforge.kernels.dplr_step_triton import dplr_step_triton, twofold_step_triton
from mixforge.kernels.dplr_triton import dplr_triton, twofold_linear_triton
from mixforge.kernels.gated_scan import gated_scan_reference
from mixforge.kernels.gated_scan_complex import gated_scan_complex_reference
from mixforge.kernels.gated_scan_triton import (
    gated_scan_complex_step_triton,
    gated_scan_complex_triton,
    gated_scan_step_triton,
    gated_scan_triton,
)
from mixforge.kernels.linear_decode_triton import linear_decode_triton
from mixforge.kernels.log_linear_step_triton import log_linear_step_triton
from mixforge.kernels.norm import rms_norm_gated_reference, rms_norm_reference
from mixforge.kernels.norm_triton import rms_norm_gated_triton, rms_norm_triton
from mixforge.kernels.selective_scan import selective_scan_reference
from mixforge.kernels.selective_scan_triton import selective_scan_step_triton, selective_scan_triton
from mixforge.kernels.short_conv import short_conv_reference
from mixforge.kernels.short_conv_triton import short_conv_step_triton, short_conv_triton
from mixforge.kernels.softmax_scan_step_triton import softmax_scan_step_triton
from mixforge.kernels.twofold_linear import twofold_linear_reference

DECAYS: Mapping[str, tuple[str, ...] | None] = {
    "none": None,
    "head": ("G",),
    "scalar": ("B", "T", "G"),
    "channel": ("B", "T", "G", "K"),
}
RULES = ("add", "delta")


def _chunked_linear(case: Case) -> Call:
    decay, rule = case.variant.split(", ")
    log, size = DECAYS[decay], case.sizes["K"] ** -0.5
    return chunked_linear_triton, (
        case.tensor("B", "T", "H", "K", low=-size, high=size),
        # Of a norm below 1, which the delta rule needs to stay bounded.
        case.tensor("B", "T", "H", "K", low=-size, high=size),
        case.tensor("B", "T", "G", "V"),
        None if log is None else case.tensor(*log, dtype=torch.float32, low=-1.0, high=0.0),
        case.tensor("B", "T", "G", dtype=torch.float32, low=0.0, high=1.0) if rule == "delta" else None,
    )


def _linear_of_constants(case: Case) -> Call:
    """Decays that get no gradient."""
    function, (q, k, v, log, beta) = _chunked_linear(case)
    return function, (q, k, v, log.detach(), beta)


def _linear_inference(case: Case) -> Call:
    function, given = _chunked_linear(case)
    return function, tuple(None if x is None else x.detach() for x in given)


def _packed_linear(case: Case) -> Call:
    """Sequences one after the other, with states before them; fewer heads of keys than of values."""
    function, given = _chunked_linear(case)
    bounds = _still(case, "N+1", dtype=torch.int64)
    return partial(function, cu_seqlens=bounds), (
        *given,
        case.tensor("N", "G", "K", "V", dtype=torch.float32),
    )


def _dplr(case: Case) -> Call:
    size = case.sizes["K"] ** -0.5
    # A removal of a norm below 1 keeps the state bounded.
    q, k = (case.tensor("B", "T", "H", "K", low=-size, high=size) for _ in range(2))
    removal = case.tensor("B", "T", "H", "R", "K", dtype=torch.float32, low=-size, high=size)
    decay = case.tensor("B", "T", "H", "K", dtype=torch.float32, low=-1.0, high=0.0)
    return dplr_triton, (q, k, case.tensor("B", "T", "H", "V"), decay, removal)


def _twofold_linear(case: Case) -> Call:
    size = case.sizes["K"] ** -0.5
    q, k = (case.tensor("B", "T", "H", "K", low=-size, high=size) for _ in range(2))
    decays = (case.tensor("B", "T", "H", dim, dtype=torch.float32, low=-1.0, high=0.0) for dim in ("K", "V"))
    return twofold_linear_triton, (q, k, case.tensor("B", "T", "H", "V"), *decays)


def _dplr_step(case: Case) -> Call:
    q, k, v = (_still(case, "B", "H", dim) for dim in ("K", "K", "V"))
    decay, state = (
        _still(case, *dims, dtype=torch.float32) for dims in (("B", "H", "K"), ("B", "H", "K", "V"))
    )
    if case.variant == "removal":
        removal = _still(case, "B", "H", "R", "K", dtype=torch.float32)
        return dplr_step_triton, (q, k, v, decay, removal, state)
    return twofold_step_triton, (q, k, v, decay, _still(case, "B", "H", "V", dtype=torch.float32), state)


def _linear_decode(case: Case) -> Call:
    """A step of kda between its projections, or of mamba2."""
    sizes, is_delta = case.sizes, case.variant == "channel, delta"
    heads, key_heads = sizes["G"], sizes["H"]
    inner = heads * sizes["V"]
    inputs = {**sizes, "F": 2 * key_heads * sizes["K"] + inner, "I": inner, "GK": heads * sizes["K"]}
    wide = replace(case, sizes=inputs)
    logits, bias = (("B", "GK"), ("GK",)) if is_delta else (("B", "G"), ("G",))
    return linear_decode_triton, (
        _still(wide, "B", "F"),
        _still(wide, *logits),
        _still(wide, *bias, dtype=torch.float32),
        _still(wide, "G", dtype=torch.float32),
        _still(wide, "B", "G") if is_delta else None,
        _still(wide, "B", "I"),
        None if is_delta else _still(wide, "G", dtype=torch.float32),
        _still(wide, "V", dtype=torch.float32) if is_delta else None,
        _still(wide, "B", "G", "K", "V", dtype=torch.float32),
        *(
            key_heads,
            "channel" if is_delta else "scalar",
            1.0,
            "none",
            is_delta,
            1.0,
            not is_delta,
            "silu",
            1e-6,
        ),
    )


def _linear_step(case: Case) -> Call:
    decay, rule = case.variant.split(", ")
    log = DECAYS[decay]
    vectors = (_still(case, *letters) for letters in (("B", "H", "K"), ("B", "H", "K"), ("B", "G", "V")))
    return linear_step_triton, (
        *vectors,
        None if log is None else _still(case, *(x for x in log if x != "T"), dtype=torch.float32),
        _still(case, "B", "G", dtype=torch.float32) if rule == "delta" else None,
        _still(case, "B", "G", "K", "V", dtype=torch.float32),
    )


def _log_linear_step(case: Case) -> Call:
    _, (q, k, v, decay, beta, _) = _linear_step(case)
    state = _still(case, "B", "G", "N", "K", "V", dtype=torch.float32)
    weight = _still(case, "B", "G", "N", dtype=torch.float32)
    position = torch.empty((), dtype=torch.int64, device=case.device)
    return log_linear_step_triton, (q, k, v, decay, beta, state, weight, position)


def _diagonal_ssm_step(case: Case) -> Call:
    rates = _still(case, "D", "N", dtype=torch.float32), _still(case, "D", "N", dtype=torch.float32)
    c = _still(case, "D", "N", "P", dtype=torch.float32)
    state = _still(case, "B", "D", "N", "P", dtype=torch.float32)
    frequency = rates[1] if case.variant == "complex" else None
    return diagonal_ssm_step_triton, (_still(case, "B", "D"), rates[0], frequency, c, state)


def _softmax_scan_step(case: Case) -> Call:
    kept = (("B", "H"), ("B", "H"), ("B", "H", "V"))
    carry = tuple(_still(case, *letters, dtype=torch.float32) for letters in kept)
    return softmax_scan_step_triton, (_still(case, "B", "H"), _still(case, "B", "H", "V"), carry)


def _gated_scan(case: Case) -> Call:
    gate = case.tensor("B", "T", "D", dtype=torch.float32, low=-1.0, high=0.0)
    if case.variant == "complex":
        phase = case.tensor("B", "T", "D", dtype=torch.float32)
        return gated_scan_complex_triton, (gate, phase, case.tensor("B", "T", "P", "D"))
    return gated_scan_triton, (gate, case.tensor("B", "T", "D"))


def _packed_gated_scan(case: Case) -> Call:
    """Sequences one after the other, with states before them, in so few programs that the time is cut."""
    function, given = _gated_scan(case)
    state = case.tensor("N", "D", dtype=torch.float32)
    return function, (*given, state, _still(case, "N+1", dtype=torch.int64))


def _gated_scan_step(case: Case) -> Call:
    if case.variant == "complex":
        gate, phase = (_still(case, "B", "D", dtype=torch.float32) for _ in range(2))
        values = _still(case, "B", "P", "D"), _still(case, "B", "P", "D", dtype=torch.float32)
        return gated_scan_complex_step_triton, (gate, phase, *values)
    gate, state = (_still(case, "B", "D", dtype=torch.float32) for _ in range(2))
    return gated_scan_step_triton, (gate, _still(case, "B", "D"), state)


def _selective_scan(case: Case) -> Call:
    return selective_scan_triton, (
        case.tensor("B", "T", "D"),
        case.tensor("B", "T", "D", low=0.0, high=0.1),
        case.tensor("D", "N", dtype=torch.float32, low=-8.0, high=-0.1),
        case.tensor("B", "T", "N"),
        case.tensor("B", "T", "N"),
        case.tensor("D", dtype=torch.float32),
    )


def _selective_scan_step(case: Case) -> Call:
    inputs, rate = [_still(case, "B", "D") for _ in range(2)], _still(case, "D", "N", dtype=torch.float32)
    maps = [_still(case, "B", "N") for _ in range(2)]
    skip, state = _still(case, "D", dtype=torch.float32), _still(case, "B", "D", "N", dtype=torch.float32)
    return selective_scan_step_triton, (*inputs, rate, *maps, skip, state)


def _short_conv(case: Case) -> Call:
    weights = case.tensor("D", "W"), case.tensor("D")
    return short_conv_triton, (case.tensor("B", "T", "D"), *weights, case.variant)


def _continued_short_conv(case: Case) -> Call:
    form, inputs = _short_conv(case)
    return form, (*inputs, case.tensor("B", "D", "W-1"))


def _short_conv_step(case: Case) -> Call:
    inputs = (_still(case, *letters) for letters in (("B", "D"), ("D", "W"), ("D",)))
    state = torch.empty(
        case.sizes["B"], case.sizes["D"], case.sizes["W"] - 1, dtype=case.dtype, device=case.device
    )
    return short_conv_step_triton, (*inputs, case.variant, state)


def _norm(case: Case) -> Call:
    x, weight = case.tensor("B", "T", "D"), case.tensor("D", dtype=torch.float32)
    if case.variant == "gated":
        return rms_norm_gated_triton, (x, case.tensor("B", "T", "D"), weight)
    return rms_norm_triton, (x, weight)


def _recurrent_cell(case: Case) -> Call:
    wide, biases = _of_cell(case), ("H", "K") if recurrent_cells.CELLS[case.variant].has_bias else None
    return recurrent_cells.form("triton", case.variant), (
        wide.tensor("B", "T", "H", "F"),
        wide.tensor("H", "K", "F", low=-(case.sizes["K"] ** -0.5), high=case.sizes["K"] ** -0.5),
        None if biases is None else wide.tensor(*biases),
    )


def _recurrent_cell_step(case: Case) -> Call:
    wide = _of_cell(case)
    weights = _still(wide, "B", "H", "F"), _still(wide, "H", "K", "F")
    state = _still(wide, "B", "S", "H", "K", dtype=torch.float32)
    return recurrent_cells.step_form("triton", case.variant), (*weights, None, state)


def _of_cell(case: Case) -> Case:
    """With the widths of its gates and the number of its states."""
    cell = recurrent_cells.CELLS[case.variant]
    return replace(case, sizes={**case.sizes, "F": cell.gates * case.sizes["K"], "S": len(cell.first)})


def _still(case: Case, *letters: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that gets no gradient."""
    return case.tensor(*letters, dtype=dtype, grad=False)


def _case(
    op: str,
    variant: str,
    call: Callable[[Case], Call],
    sizes: Mapping[str, int],
    reference: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    return Case(op=op, variant=variant, dtype=dtype, sizes=sizes, call=call, reference=reference)


def _fine(op: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case of the recurrences in chunks of 16 rows."""
    variant, call, reference = {
        "dplr": ("removal", _dplr, dplr_reference),
        "twofold_linear": ("both decays", _twofold_linear, twofold_linear_reference),
    }[op]
    return _case(
        op, variant, call, {"B": 8, "T": 4096, "H": 16, "K": dim, "V": dim, "R": 2}, reference, dtype
    )


def _linear(variant: str, dim: int, dtype: torch.dtype = torch.bfloat16, op: str = "chunked_linear") -> Case:
    sizes = {"B": 8, "T": 4096, "H": 16, "G": 16, "K": dim, "V": dim}
    return _case(op, variant, _chunked_linear, sizes, chunked_linear_reference, dtype)


def _cell(name: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    sizes = {"B": 16, "T": 2048, "H": 1024 // dim, "K": dim}
    reference = recurrent_cells.form("reference", name)
    return _case("recurrent_cells", name, _recurrent_cell, sizes, reference, dtype)


_WIDE = {"B": 8, "T": 4096, "D": 2048}
_ROWS = {"B": 64, "D": 2048}
_PACKED = {"B": 1, "T": 32768, "H": 4, "G": 16, "K": 128, "V": 128, "N": 8, "N+1": 9}
_LONG = {"B": 1, "T": 32768, "H": 32, "G": 32, "K": 128, "V": 128}
_SHORT = {**_LONG, "B": 8, "T": 4096}
_FOUR = ("none, add", "scalar, add", "scalar, delta", "channel, delta")
_NARROW = {"B": 8, "T": 4096, "H": 16, "G": 16, "K": 32}
_WIDER = {"B": 2, "T": 4096, "H": 16, "G": 16, "K": 256, "V": 128}
_STATES = {"B": 64, "H": 16, "G": 16, "K": 128, "V": 128}

CASES: tuple[Case, ...] = (
    *(_linear(f"{decay}, {rule}", 128) for decay in DECAYS for rule in RULES),
    # The widest keys there are: the heaviest combinations stand for all.
    *(_linear(variant, 256) for variant in ("scalar, delta", "channel, delta")),
    *(_linear("channel, delta", dim, torch.float32) for dim in (64, 128)),
    _linear("channel, delta", 128, torch.float16),
    # Narrow heads, whose parts are made by fewer kernels.
    *(_linear("scalar, add", dim, op="narrow linear") for dim in (32, 64)),
    _linear("scalar, delta", 64, op="narrow linear"),
    # Few key channels beside many of the values, of which compilers have made wrong code.
    *(
        _case("chunked_linear", variant, _chunked_linear, {**_NARROW, "V": values}, chunked_linear_reference)
        for variant, values in (("none, add", 128), ("scalar, delta", 64))
    ),
    # So few programs that the output is made by a kernel of its own, and so many that nothing is kept for it.
    *(_case("long linear", variant, _chunked_linear, _LONG, chunked_linear_reference) for variant in _FOUR),
    *(_case("linear inference", variant, _linear_inference, _SHORT) for variant in _FOUR),
    _case("linear of constants", "head, add", _linear_of_constants, _SHORT),
    _case("packed linear", "scalar, delta", _packed_linear, _PACKED),
    _case("packed linear", "channel, add", _packed_linear, _PACKED),
    # States that no kernel holds.
    _case("wide linear", "channel, delta", _chunked_linear, _WIDER, chunked_linear_reference, torch.float32),
    _case("wide linear", "scalar, delta", _chunked_linear, {**_WIDER, "K": 512}, chunked_linear_reference),
    *(
        _case("linear decode", variant, _linear_decode, {"B": 64, "H": 16, "G": 16, "K": keys, "V": values})
        for variant in ("channel, delta", "scalar, add")
        for keys, values in ((64, 64), (128, 256))
    ),
    *(_case("linear step", f"{decay}, {rule}", _linear_step, _STATES) for decay in DECAYS for rule in RULES),
    _case("wide linear step", "channel, delta", _linear_step, {**_STATES, "K": 512}),
    *(
        _case("log linear step", variant, _log_linear_step, {**_STATES, "N": 13})
        for variant in ("scalar, add", "scalar, delta")
    ),
    # The heads of RWKV-7, and the heaviest that are usual.
    _fine("dplr", 64),
    _fine("dplr", 64, torch.float32),
    _fine("dplr", 128, torch.float16),
    _fine("twofold_linear", 128),
    *(_case("dplr step", variant, _dplr_step, {**_STATES, "R": 2}) for variant in ("removal", "both decays")),
    _case("gated_scan", "real", _gated_scan, _WIDE, gated_scan_reference),
    _case("gated_scan", "real", _gated_scan, _WIDE, gated_scan_reference, torch.float32),
    _case("gated_scan", "complex", _gated_scan, {**_WIDE, "P": 2}, gated_scan_complex_reference),
    _case("packed gated_scan", "real", _packed_gated_scan, {"B": 1, "T": 32768, "D": 2048, "N": 8, "N+1": 9}),
    _case("gated_scan step", "real", _gated_scan_step, _ROWS),
    _case("gated_scan step", "complex", _gated_scan_step, {**_ROWS, "P": 2}),
    _case("diagonal_ssm step", "real", _diagonal_ssm_step, {**_ROWS, "N": 16, "P": 1}),
    _case("diagonal_ssm step", "complex", _diagonal_ssm_step, {**_ROWS, "N": 32, "P": 2}),
    _case("softmax_scan step", "learned query", _softmax_scan_step, {"B": 64, "H": 16, "V": 128}),
    _case("selective_scan", "skip", _selective_scan, {**_WIDE, "N": 16}, selective_scan_reference),
    # Few programs, so that time is cut into segments.
    _case(
        "selective_scan",
        "segments",
        _selective_scan,
        {"B": 1, "T": 4096, "D": 128, "N": 16},
        selective_scan_reference,
    ),
    _case("selective_scan step", "skip", _selective_scan_step, {**_ROWS, "N": 16}),
    _case("short_conv", "silu", _short_conv, {**_WIDE, "W": 4}, short_conv_reference),
    _case("short_conv", "none", _short_conv, {**_WIDE, "W": 4}, short_conv_reference),
    _case(
        "continued short_conv",
        "silu",
        _continued_short_conv,
        {**_WIDE, "W": 4, "W-1": 3},
        short_conv_reference,
    ),
    _case("short_conv step", "silu", _short_conv_step, {**_ROWS, "W": 4}),
    # The widest heads whose matrices are held, and some whose are not.
    _cell("slstm", 128),
    _cell("gru", 128),
    _cell("slstm", 64, torch.float32),
    _cell("lstm", 512),
    _case("recurrent_cells step", "slstm", _recurrent_cell_step, {"B": 64, "H": 16, "K": 64}),
    _case("norm", "plain", _norm, _WIDE, rms_norm_reference),
    _case("norm", "gated", _norm, _WIDE, rms_norm_gated_reference),
    _case("norm", "gated", _norm, {"B": 8, "T": 65536, "D": 128}, rms_norm_gated_reference),
)

# What asks most of a compiler, and launches every kernel.
_HARDEST = (
    ("chunked_linear", "channel, delta"),
    ("narrow linear", "scalar, delta"),
    ("long linear", "channel, delta"),
    ("linear decode", "channel, delta"),
    ("wide linear", "channel, delta"),
    ("linear step", "channel, delta"),
    ("wide linear step", "channel, delta"),
    ("log linear step", "scalar, delta"),
    ("dplr", "removal"),
    ("twofold_linear", "both decays"),
    ("dplr step", "removal"),
    ("gated_scan", "complex"),
    ("packed gated_scan", "real"),
    ("gated_scan step", "complex"),
    ("diagonal_ssm step", "complex"),
    ("softmax_scan step", "learned query"),
    ("selective_scan", "segments"),
    ("selective_scan step", "skip"),
    ("continued short_conv", "silu"),
    ("short_conv step", "silu"),
    ("recurrent_cells", "slstm"),
    ("recurrent_cells", "lstm"),
    ("recurrent_cells step", "slstm"),
    ("norm", "gated"),
)
ONCE: tuple[Case, ...] = tuple(
    next(case for case in CASES if (case.op, case.variant) == wanted) for wanted in _HARDEST
)
