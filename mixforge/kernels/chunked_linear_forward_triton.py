"""The forward stages of the linear family, of which `chunked_linear_triton` has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from mixforge.kernels.chunked_linear_rows_triton import (
    chunk_place,
    chunk_sums,
    cut_log,
    operand,
    pair_weights,
    running_sums,
    sequence_place,
)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_gram(
    q, k, log, beta, sums, q_read, k_read, k_write, pairs, system, cu, table, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and A of one chunk and head, the running sums of its log decays, and what decays per channel scale."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within = tl.arange(0, C)
    # Places count from the chunk's first row: numbers of 64 bits for each element would fill the registers.
    base = first + c * C
    count = tl.maximum(tl.minimum(length - c * C, C), 0).to(tl.int32)
    valid = within < count
    last_row = tl.maximum(count, 1) - 1
    head = base * G + g
    q += (base * H + g // (G // H)) * K
    k += (base * H + g // (G // H)) * K
    pairs += head * C
    if GATE == 3:
        log += head * K
        sums += head * K
        q_read += head * K
        k_read += head * K
        k_write += head * K
    if GATE == 2:
        log += head
        sums += base * G
    inner = tl.zeros([C, C], tl.float32)
    keys = tl.zeros([C, C], tl.float32)
    # Products of float32 hold so much that those of keys take a turn of their own.
    APART: tl.constexpr = DELTA and (GATE == 3) and (WIDE == tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        key_row = (within * (H * K))[:, None] + channel[None, :]
        q_CK = tl.load(q + key_row, mask=mask, other=0.0)
        k_CK = tl.load(k + key_row, mask=mask, other=0.0)
        if GATE == 3:
            spot = (within * (G * K))[:, None] + channel[None, :]
            total = tl.cumsum(tl.load(log + spot, mask=mask, other=0.0).to(tl.float32), 0)
            tl.store(sums + spot, total, mask=mask)
            # Single rows of the sums are read again: a sum over rows, of which one counts, takes longer.
            tl.debug_barrier()
            last = tl.load(sums + last_row * (G * K) + channel, mask=channel < K, other=0.0)
            read = tl.exp(total)
            dtype = q_read.dtype.element_ty
            tl.store(q_read + spot, (q_CK.to(tl.float32) * read).to(dtype), mask=mask)
            tl.store(k_read + spot, (k_CK.to(tl.float32) * read).to(dtype), mask=mask)
            write = tl.exp(tl.minimum(last[None, :] - total, 0.0))
            tl.store(k_write + spot, (k_CK.to(tl.float32) * write).to(dtype), mask=mask)
            anchors = _anchors(sums, within, last_row, channel, G, K, SUB)
            # From another number in each turn, or masks of pairs that are the same in all would be held in registers.
            number = within + 2 * start
            inner += _pairs(q_CK, k_CK, total, anchors, number, SUB, WIDE, PRECISION)
            if DELTA and not APART:
                keys += _pairs(k_CK, k_CK, total, anchors, number, SUB, WIDE, PRECISION)
        else:
            inner = tl.dot(q_CK, tl.trans(k_CK), inner, input_precision=PRECISION)
            if DELTA:
                keys = tl.dot(k_CK, tl.trans(k_CK), keys, input_precision=PRECISION)
    if APART:
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            mask = valid[:, None] & (channel < K)[None, :]
            k_CK = tl.load(k + (within * (H * K))[:, None] + channel[None, :], mask=mask, other=0.0)
            total = tl.load(sums + (within * (G * K))[:, None] + channel[None, :], mask=mask, other=0.0)
            anchors = _anchors(sums, within, last_row, channel, G, K, SUB)
            keys += _pairs(k_CK, k_CK, total, anchors, within + 2 * start, SUB, WIDE, PRECISION)
    causal = within[:, None] >= within[None, :]
    if GATE == 2:
        decay = tl.load(log + within * G, mask=valid, other=0.0).to(tl.float32)
        total = tl.cumsum(cut_log(decay), 0)
        tl.store(sums + within * G + g, total, mask=valid)
    if GATE == 1:
        total = running_sums(log, sums, g, within, valid, within, G, GATE)
    if (GATE == 1) or (GATE == 2):
        weight = pair_weights(total, causal & valid[:, None])
        inner *= weight
        keys *= weight
    place = (within * (G * C))[:, None] + within[None, :]
    tl.store(pairs + place, tl.where(causal, inner, 0.0).to(pairs.dtype.element_ty), mask=valid[:, None])
    if DELTA:
        step = tl.load(beta + head + within * G, mask=valid, other=0.0).to(tl.float32)
        below = within[:, None] > within[None, :]
        tl.store(system + head * C + place, tl.where(below, step[:, None] * keys, 0.0), mask=valid[:, None])


@triton.jit
def _anchors(sums, within, last_row, channel, G: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr):
    """Sums [C, BK] that a row's powers start from: in the first rows of the chunk's second half, of the second block of
    its half, and of its own block. They are read again: a sum over rows of which one counts would take longer."""
    middle = tl.minimum(within * 0 + 2 * SUB, last_row)
    second = tl.minimum(within // (2 * SUB) * (2 * SUB) + SUB, last_row)
    block = tl.minimum(within // SUB * SUB, last_row)
    return (
        _rows_of(sums, middle, channel, G, K),
        _rows_of(sums, second, channel, G, K),
        _rows_of(sums, block, channel, G, K),
    )


@triton.jit
def _rows_of(sums, row, channel, G: tl.constexpr, K: tl.constexpr):
    place = (row * (G * K))[:, None] + channel[None, :]
    return tl.load(sums + place, mask=(channel < K)[None, :], other=0.0)


@triton.jit
def _pairs(
    x, k, total, anchors, number, SUB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums over channels of x_i e^(G_i - G_j) k_j for the pairs i >= j of a chunk, [C, C]; those above are anything.

    Pairs of two halves of the chunk take powers from the second half's first row, pairs of two blocks of a half from the
    second block's: all are at most 1. Pairs of one block take two, from its first row, and others may overflow there.
    """
    middle, second, block = anchors
    x, k = x.to(tl.float32), k.to(tl.float32)
    power = tl.exp(-tl.abs(total - middle))
    far_x, far_k = operand(x * power, WIDE, PRECISION), operand(k * power, WIDE, PRECISION)
    power = tl.exp(-tl.abs(total - second))
    near_x, near_k = operand(x * power, WIDE, PRECISION), operand(k * power, WIDE, PRECISION)
    own_x = operand(x * tl.exp(tl.minimum(total - block, 0.0)), WIDE, PRECISION)
    own_k = operand(k * tl.exp(tl.minimum(block - total, 80.0)), WIDE, PRECISION)
    apart = number[:, None] ^ number[None, :]
    made = tl.dot(far_x, tl.trans(far_k), input_precision=PRECISION)
    made = tl.where(apart < 2 * SUB, tl.dot(near_x, tl.trans(near_k), input_precision=PRECISION), made)
    return tl.where(apart < SUB, tl.dot(own_x, tl.trans(own_k), input_precision=PRECISION), made)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_gram_solve(
    q, k, log, beta, sums, pairs, system, inverse, cu, table, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """`linear_gram` and `linear_solve` in one, for keys that a single warp can hold: P, M and G of one chunk and head.

    Rule delta, and no decays per channel. `system` is room for A.
    """
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within, channel = tl.arange(0, C), tl.arange(0, KP)
    # Places count from the chunk's first row: numbers of 64 bits for each element would fill the registers.
    base = first + c * C
    count = tl.maximum(tl.minimum(length - c * C, C), 0).to(tl.int32)
    head = base * G + g
    q += (base * H + g // (G // H)) * K
    k += (base * H + g // (G // H)) * K
    pairs += head * C
    system += head * C
    beta += head
    if GATE == 2:
        log += head
        sums += base * G
        decay = tl.load(log + within * G, mask=within < count, other=0.0).to(tl.float32)
        tl.store(sums + within * G + g, tl.cumsum(cut_log(decay), 0), mask=within < count)
        tl.debug_barrier()
    k_CK = tl.load(
        k + ((within * (H * K))[:, None] + channel[None, :]),
        mask=(within < count)[:, None] & (channel < K)[None, :],
        other=0.0,
    )
    for start in range(0, C, SUB):
        row = start + tl.arange(0, SUB)
        valid = row < count
        place = (row * (H * K))[:, None] + channel[None, :]
        mask = valid[:, None] & (channel < K)[None, :]
        p_SC = tl.dot(tl.load(q + place, mask=mask, other=0.0), tl.trans(k_CK), input_precision=PRECISION)
        a_SC = tl.dot(tl.load(k + place, mask=mask, other=0.0), tl.trans(k_CK), input_precision=PRECISION)
        causal = row[:, None] >= within[None, :]
        if (GATE == 1) or (GATE == 2):
            here = running_sums(log, sums, g, row, valid, row, G, GATE)
            there = running_sums(log, sums, g, within, within < count, within, G, GATE)
            weight = tl.exp(tl.where(causal & valid[:, None], here[:, None] - there[None, :], 0.0))
            p_SC *= weight
            a_SC *= weight
        place = (row * (G * C))[:, None] + within[None, :]
        p_SC = tl.where(causal, p_SC, 0.0).to(pairs.dtype.element_ty)
        tl.store(pairs + place, p_SC, mask=valid[:, None])
        step = tl.load(beta + row * G, mask=valid, other=0.0).to(tl.float32)
        below = row[:, None] > within[None, :]
        tl.store(system + place, tl.where(below, step[:, None] * a_SC, 0.0), mask=valid[:, None])
    tl.debug_barrier()
    _solve(system, inverse + head * C, count, G, C, SUB, SOLVE)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_solve(
    system, inverse, cu, table, T, NC,
    G: tl.constexpr, VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M = (I + A)^-1 of one chunk and head. A is lost."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    count = tl.minimum(length - c * C, C).to(tl.int32)
    head = ((first + c * C) * G + bg % G) * C
    _solve(system + head, inverse + head, count, G, C, SUB, PRECISION)


@triton.jit
def _solve(
    system, inverse, left, G: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Substitution in the diagonal blocks of the `left` rows of a chunk, then products of blocks."""
    within = tl.arange(0, SUB)
    in_0, in_1, in_2, in_3 = (
        within < left,
        within + SUB < left,
        within + 2 * SUB < left,
        within + 3 * SUB < left,
    )
    # Each column by itself, of all blocks on the diagonal beside one another: a thread needs nothing of another's.
    column = tl.arange(0, C)
    start = column // SUB * SUB
    corner = system + (start * (G * C) + start)
    rows = (tl.where(column == start, 1.0, 0.0),)
    for i in tl.static_range(1, SUB):
        row_C = tl.where(column == start + i, 1.0, 0.0)
        for j in tl.static_range(i):
            row_C -= tl.load(corner + (i * G * C + j), mask=start + i < left, other=0.0) * rows[j]
        rows += (row_C,)
    # In place of A, of which all has been read, to be read again as blocks.
    tl.debug_barrier()
    for i in tl.static_range(SUB):
        tl.store(corner + (column - start + i * G * C), rows[i], mask=start + i < left)
    tl.debug_barrier()
    m_00 = _block(system, in_0, 0, 0, G, C, SUB)
    m_11 = _block(system, in_1, 1, 1, G, C, SUB)
    m_22 = _block(system, in_2, 2, 2, G, C, SUB)
    m_33 = _block(system, in_3, 3, 3, G, C, SUB)
    a_10 = _block(system, in_1, 1, 0, G, C, SUB)
    a_20 = _block(system, in_2, 2, 0, G, C, SUB)
    a_21 = _block(system, in_2, 2, 1, G, C, SUB)
    a_30 = _block(system, in_3, 3, 0, G, C, SUB)
    a_31 = _block(system, in_3, 3, 1, G, C, SUB)
    a_32 = _block(system, in_3, 3, 2, G, C, SUB)
    zero = tl.zeros([SUB, SUB], tl.float32)
    _store_row(inverse, in_0, 0, m_00, zero, zero, zero, G, C, SUB)
    m_10 = -tl.dot(m_11, tl.dot(a_10, m_00, input_precision=PRECISION), input_precision=PRECISION)
    _store_row(inverse, in_1, 1, m_10, m_11, zero, zero, G, C, SUB)
    m_21 = -tl.dot(m_22, tl.dot(a_21, m_11, input_precision=PRECISION), input_precision=PRECISION)
    m_32 = -tl.dot(m_33, tl.dot(a_32, m_22, input_precision=PRECISION), input_precision=PRECISION)
    sum_20 = tl.dot(a_20, m_00, input_precision=PRECISION) + tl.dot(a_21, m_10, input_precision=PRECISION)
    m_20 = -tl.dot(m_22, sum_20, input_precision=PRECISION)
    _store_row(inverse, in_2, 2, m_20, m_21, m_22, zero, G, C, SUB)
    sum_31 = tl.dot(a_31, m_11, input_precision=PRECISION) + tl.dot(a_32, m_21, input_precision=PRECISION)
    m_31 = -tl.dot(m_33, sum_31, input_precision=PRECISION)
    sum_30 = tl.dot(a_30, m_00, input_precision=PRECISION) + tl.dot(a_31, m_10, input_precision=PRECISION)
    sum_30 += tl.dot(a_32, m_20, input_precision=PRECISION)
    m_30 = -tl.dot(m_33, sum_30, input_precision=PRECISION)
    _store_row(inverse, in_3, 3, m_30, m_31, m_32, m_33, G, C, SUB)


@triton.jit
def _block(
    system, valid, i: tl.constexpr, j: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Rows of block i and columns of block j of A."""
    within = tl.arange(0, SUB)
    place = ((within + i * SUB) * (G * C))[:, None] + (within + j * SUB)[None, :]
    return tl.load(system + place, mask=valid[:, None], other=0.0)


@triton.jit
def _store_row(
    inverse, valid, i: tl.constexpr, m_0, m_1, m_2, m_3, G: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """The four blocks of a row of blocks."""
    within = tl.arange(0, SUB)
    place = inverse + (((within + i * SUB) * (G * C))[:, None] + within[None, :])
    tl.store(place, m_0.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + SUB, m_1.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + 2 * SUB, m_2.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + 3 * SUB, m_3.to(inverse.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan(
    q_read, pairs, o, k_read, k_write, v, log, beta, sums, inverse, u, states, first_state, final_state,
    cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U, the state before each chunk and the last: one head of a sequence and a block of value channels.

    With q_read O as well, and P where no stage before has made it. What is None is not kept.
    """
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    if first_state is None:
        state = tl.zeros([KP, BV], tl.float32)
    else:
        state = tl.load(first_state + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0).to(
            tl.float32
        )
    for start in range(0, length, C):
        if states is not None:
            before = states + (chunk * G + g) * K * V + matrix
            tl.store(before, state.to(states.dtype.element_ty), mask=in_matrix)
        count = tl.minimum(length - start, C).to(tl.int32)
        valid = within < count
        row = first + start + within
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        pair = (row * G + g)[:, None] * C + within[None, :]
        k_CK = tl.load(k_read + key_row, mask=in_keys, other=0.0)
        spot = (row * G + g)[:, None] * V + value[None, :]
        u_CV = tl.load(v + spot, mask=in_values, other=0.0)
        if (GATE == 2) and not DELTA:
            # No stage before has made the sums.
            decay = cut_log(tl.load(log + row * G + g, mask=valid, other=0.0).to(tl.float32))
            total = tl.cumsum(decay, 0)
            last = tl.sum(tl.where(within == count - 1, total, 0.0), 0)
            if sums is not None:
                tl.store(sums + row * G + g, total, mask=valid & (block == 0))
        elif (GATE == 1) or (GATE == 2):
            total, last = chunk_sums(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        if q_read is not None:
            q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
            if DELTA or (GATE == 3):
                p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0)
            else:
                inner = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
                # With the start, or a mask that is the same in all turns would be held in registers.
                token = tl.cast(start, tl.int32) + within
                causal = token[:, None] >= token[None, :]
                if (GATE == 1) or (GATE == 2):
                    inner *= tl.exp(
                        tl.where(causal & valid[:, None], total[:, None] - total[None, :], float("-inf"))
                    )
                    p_CC = inner.to(q_CK.dtype)
                else:
                    p_CC = tl.where(causal, inner, 0.0).to(q_CK.dtype)
                if pairs is not None:
                    tl.store(pairs + pair, p_CC, mask=valid[:, None] & (block == 0))
            o_CV = tl.dot(q_CK, state.to(q_CK.dtype), input_precision=PRECISION)
            if (GATE == 1) or (GATE == 2):
                o_CV *= tl.exp(total)[:, None]
        if DELTA:
            step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
            m_CC = tl.load(inverse + pair, mask=valid[:, None], other=0.0)
            x_CV = tl.dot(k_CK, state.to(k_CK.dtype), input_precision=PRECISION)
            if (GATE == 1) or (GATE == 2):
                x_CV *= tl.exp(total)[:, None]
            x_CV = (step[:, None] * (u_CV.to(tl.float32) - x_CV)).to(k_CK.dtype)
            u_CV = tl.dot(m_CC, x_CV, input_precision=PRECISION).to(k_CK.dtype)
            if u is not None:
                tl.store(u + spot, u_CV, mask=in_values)
        if q_read is not None:
            o_CV = tl.dot(p_CC, u_CV, o_CV, input_precision=PRECISION)
            tl.store(o + spot, o_CV.to(o.dtype.element_ty), mask=in_values)
        if GATE == 3:
            k_CK = tl.load(k_write + key_row, mask=in_keys, other=0.0)
            last = (first + start + count - 1) * G + g
            state *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
        if (GATE == 1) or (GATE == 2):
            write = tl.exp(tl.minimum(last - total, 0.0))
            u_CV = (u_CV.to(tl.float32) * write[:, None]).to(k_CK.dtype)
            state *= tl.exp(last)
        state = tl.dot(tl.trans(k_CK), u_CV, state, input_precision=PRECISION)
        chunk += 1
    tl.store(final_state + ng.to(tl.int64) * K * V + matrix, state, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_output(
    q_read, k, log, sums, pairs, u, states, o, cu, table, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, GRAM: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O of one chunk and head, a block of value channels; with GRAM, P as well, which is kept where it is not None."""
    bg, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = bg % G
    first, length, c, h = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within, value = tl.arange(0, C), block * BV + tl.arange(0, BV)
    valid = c * C + within < length
    row = first + c * C + within
    spot = (row * G + g)[:, None] * V + value[None, :]
    in_values = valid[:, None] & (value < V)[None, :]
    o_CV = tl.zeros([C, BV], tl.float32)
    inner = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        in_keys = valid[:, None] & (channel < K)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
        matrix = (h * G + g) * K * V + channel[:, None] * V + value[None, :]
        state = tl.load(states + matrix, mask=(channel < K)[:, None] & (value < V)[None, :], other=0.0)
        o_CV = tl.dot(q_CK, state.to(q_CK.dtype), o_CV, input_precision=PRECISION)
        if GRAM:
            k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
            inner = tl.dot(q_CK, tl.trans(k_CK), inner, input_precision=PRECISION)
    place = (row * G + g)[:, None] * C + within[None, :]
    causal = within[:, None] >= within[None, :]
    if (GATE == 1) or (GATE == 2):
        total = running_sums(log, sums, g, row, valid, within, G, GATE)
        o_CV *= tl.exp(total)[:, None]
        if GRAM:
            inner *= pair_weights(total, causal & valid[:, None])
    if GRAM:
        p_CC = tl.where(causal, inner, 0.0).to(q_read.dtype.element_ty)
        if pairs is not None:
            tl.store(pairs + place, p_CC, mask=valid[:, None] & (block == 0))
    else:
        p_CC = tl.load(pairs + place, mask=valid[:, None], other=0.0)
    o_CV = tl.dot(p_CC, tl.load(u + spot, mask=in_values, other=0.0), o_CV, input_precision=PRECISION)
    tl.store(o + spot, o_CV.to(o.dtype.element_ty), mask=in_values)
