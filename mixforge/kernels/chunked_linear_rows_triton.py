"""What the stages of the linear family share: the rows of a chunk, what scalar decays scale, and operands."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_place(chunk, b, cu, table, T, NC, VARLEN: tl.constexpr):
    """First row and length of the chunk's sequence, the chunk's number in it, and its number among all chunks."""
    if VARLEN:
        n = tl.load(table + 2 * chunk).to(tl.int64)
        first = tl.load(cu + tl.maximum(n, 0)).to(tl.int64)
        length = tl.where(n < 0, 0, tl.load(cu + tl.maximum(n, 0) + 1).to(tl.int64) - first)
        return first, length, tl.load(table + 2 * chunk + 1).to(tl.int64), chunk.to(tl.int64)
    else:
        b = b.to(tl.int64)
        return b * T, tl.cast(T, tl.int64), chunk.to(tl.int64), b * NC + chunk


@triton.jit
def cut_log(decay):
    """Log decays of at least -30; a NaN stays."""
    return tl.maximum(decay, -30.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def running_sums(log, sums, g, row, valid, within, G: tl.constexpr, GATE: tl.constexpr):
    """Running sums [C] of scalar log decays in a chunk, 0 beyond the sequence."""
    if GATE == 1:
        total = (within + 1) * cut_log(tl.load(log + g).to(tl.float32))
        return tl.where(valid, total, 0.0)
    else:
        return tl.load(sums + row * G + g, mask=valid, other=0.0)


@triton.jit
def sequence_place(n, cu, offsets, T, NC, VARLEN: tl.constexpr):
    """First row, length and first chunk of a sequence."""
    if VARLEN:
        first = tl.load(cu + n).to(tl.int64)
        return first, tl.load(cu + n + 1).to(tl.int64) - first, tl.load(offsets + n).to(tl.int64)
    else:
        n = n.to(tl.int64)
        return n * T, tl.cast(T, tl.int64), n * NC


@triton.jit
def chunk_sums(log, sums, g, row, valid, within, last_row, count, G: tl.constexpr, GATE: tl.constexpr):
    """Running sums [C] of scalar log decays in a chunk, and the last of them."""
    total = running_sums(log, sums, g, row, valid, within, G, GATE)
    if GATE == 1:
        return total, count * cut_log(tl.load(log + g).to(tl.float32))
    else:
        return total, tl.load(sums + last_row * G + g)


@triton.jit
def row_scalings(log, sums, g, row, valid, within, last_row, count, G: tl.constexpr, GATE: tl.constexpr):
    """Of scalar decays: factors of reading and writing, [C], and of keep."""
    total, last = chunk_sums(log, sums, g, row, valid, within, last_row, count, G, GATE)
    return tl.exp(total), tl.exp(tl.minimum(last - total, 0.0)), tl.exp(last)


@triton.jit
def pair_weights(total, pairs):
    """What is left at row i of what was written at row j, [C, C], from the sums of scalar decays; 1 elsewhere."""
    return tl.exp(tl.where(pairs, total[:, None] - total[None, :], 0.0))


@triton.jit
def operand(value, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """What a product takes of float32 numbers. To TF32 they are rounded, which a device would cut instead."""
    if PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return value.to(WIDE)
