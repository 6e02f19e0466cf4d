"""The backward stages of the linear family, of which `chunked_linear_triton` has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from mixforge.kernels.chunked_linear_rows_triton import (
    chunk_place,
    operand,
    pair_weights,
    row_scalings,
    running_sums,
    sequence_place,
)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan_backward(
    q_read, k_read, k_write, log, beta, sums, pairs, inverse, do, dx, dstates, dfinal, dfirst, cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX and the gradient of the state after each chunk, from the last chunk to the first."""
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    if dfinal is None:
        dstate = tl.zeros([KP, BV], tl.float32)
    else:
        dstate = tl.load(dfinal + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        start = c * C
        spot = ((chunk + c) * G + g) * K * V + matrix
        tl.store(dstates + spot, dstate.to(dstates.dtype.element_ty), mask=in_matrix)
        valid = start + within < length
        row = first + start + within
        count = tl.minimum(length - start, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        if (GATE == 1) or (GATE == 2):
            read, write, keep = row_scalings(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        k_CK = tl.load(k_write + key_row, mask=in_keys, other=0.0)
        du_CV = tl.dot(k_CK, dstate.to(k_CK.dtype), input_precision=PRECISION)
        spot = (row * G + g)[:, None] * V + value[None, :]
        do_CV = tl.load(do + spot, mask=in_values, other=0.0)
        pair = (row * G + g)[:, None] * C + within[None, :]
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0)
        if (GATE == 1) or (GATE == 2):
            du_CV *= write[:, None]
        du_CV = tl.dot(tl.trans(p_CC), do_CV, du_CV, input_precision=PRECISION)
        q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
        if GATE == 3:
            last = (first + start + count - 1) * G + g
            dstate *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
        if (GATE == 1) or (GATE == 2):
            do_CV = (do_CV.to(tl.float32) * read[:, None]).to(q_CK.dtype)
            dstate *= keep
        dstate = tl.dot(tl.trans(q_CK), do_CV, dstate, input_precision=PRECISION)
        if DELTA:
            step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
            m_CC = tl.load(inverse + pair, mask=valid[:, None], other=0.0)
            du_CV = tl.dot(tl.trans(m_CC), du_CV.to(k_CK.dtype), input_precision=PRECISION)
            # Negative, so that the product can be added to what is there.
            factor = -step
            if (GATE == 1) or (GATE == 2):
                factor *= read
            if GATE == 3:
                k_CK = tl.load(k_read + key_row, mask=in_keys, other=0.0)
            dvalue_CV = (factor[:, None] * du_CV).to(k_CK.dtype)
            dstate = tl.dot(tl.trans(k_CK), dvalue_CV, dstate, input_precision=PRECISION)
        tl.store(dx + spot, du_CV.to(dx.dtype.element_ty), mask=in_values)
    if dfirst is not None:
        tl.store(dfirst + ng.to(tl.int64) * K * V + matrix, dstate, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_pairs_backward(
    v, log, beta, sums, u, do, dx, dv, dbeta, dpairs, dsystem, cu, table, T, NC,
    G: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP and dA of one chunk and head, those of scalar decays times e^(G_i - G_j); under rule delta dV and its part of
    dbeta."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within = tl.arange(0, C)
    valid = c * C + within < length
    row = first + c * C + within
    dp_CC = tl.zeros([C, C], tl.float32)
    da_CC = tl.zeros([C, C], tl.float32)
    dstep = tl.zeros([C], tl.float32)
    step = tl.zeros([C], tl.float32)
    if DELTA:
        step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        spot = (row * G + g)[:, None] * V + value[None, :]
        mask = valid[:, None] & (value < V)[None, :]
        u_CV = tl.load(u + spot, mask=mask, other=0.0)
        dp_CC = tl.dot(
            tl.load(do + spot, mask=mask, other=0.0), tl.trans(u_CV), dp_CC, input_precision=PRECISION
        )
        if DELTA:
            dx_CV = tl.load(dx + spot, mask=mask, other=0.0)
            da_CC = tl.dot(dx_CV, tl.trans(u_CV), da_CC, input_precision=PRECISION)
            v_CV = tl.load(v + spot, mask=mask, other=0.0)
            dstep += tl.sum(dx_CV.to(tl.float32) * v_CV.to(tl.float32), 1)
            tl.store(dv + spot, (step[:, None] * dx_CV.to(tl.float32)).to(dv.dtype.element_ty), mask=mask)
    causal = within[:, None] >= within[None, :]
    if (GATE == 1) or (GATE == 2):
        total = running_sums(log, sums, g, row, valid, within, G, GATE)
        weight = pair_weights(total, causal & valid[:, None])
        dp_CC *= weight
        da_CC *= weight
    place = (row * G + g)[:, None] * C + within[None, :]
    tl.store(dpairs + place, tl.where(causal, dp_CC, 0.0).to(dpairs.dtype.element_ty), mask=valid[:, None])
    if DELTA:
        below = within[:, None] > within[None, :]
        tl.store(
            dsystem + place, tl.where(below, -da_CC, 0.0).to(dsystem.dtype.element_ty), mask=valid[:, None]
        )
        tl.store(dbeta + row * G + g, dstep, mask=valid)


@triton.jit(do_not_specialize=["rows", "T", "NC"])
def linear_gradients(
    q, k, log, beta, sums, u, states, do, dx, dstates, dpairs, dsystem, dq, dk, dlog, dbeta,
    cu, table, rows, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dK of one chunk and head, a block of key channels, with its part of dbeta, and of dG where it is wanted.

    Without dpairs dP is made here, of a rule add without decays per channel.
    """
    bg, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = bg % G
    first, length, c, h = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within, channel = tl.arange(0, C), block * BK + tl.arange(0, BK)
    # Places count from the chunk's first row: numbers of 64 bits for each element would fill the registers.
    base = first + c * C
    count = tl.maximum(tl.minimum(length - c * C, C), 0).to(tl.int32)
    valid = within < count
    head = base * G + g
    q += base * (H * K) + g // (G // H) * K
    k += base * (H * K) + g // (G // H) * K
    dq += head * K
    dk += head * K
    u += head * V
    do += head * V
    if dpairs is not None:
        dpairs += head * C
    states += (h * G + g) * (K * V)
    dstates += (h * G + g) * (K * V)
    # Rows of scalars, one for each block of key channels.
    part = block.to(tl.int64) * rows * G + head
    if GATE == 3:
        sums += head * K
        if dlog is not None:
            dlog += head * K
    if GATE == 2:
        sums += base * G
        if dlog is not None:
            dlog += part
    if DELTA:
        beta += head
        dx += head * V
        dsystem += head * C
        # The first part is that of the values, to which a single block adds its own.
        dbeta += part
        if K > BK:
            dbeta += rows * G
    step = tl.full([C], 1.0, tl.float32)
    if DELTA:
        step = tl.load(beta + within * G, mask=valid, other=0.0).to(tl.float32)
    in_keys = valid[:, None] & (channel < K)[None, :]
    key_row = (within * (H * K))[:, None] + channel[None, :]
    pair = (within * (G * C))[:, None] + within[None, :]
    last_row = tl.maximum(count, 1) - 1
    spot = (within * (G * K))[:, None] + channel[None, :]
    d_CK = tl.zeros([C, BK], tl.float32)
    if GATE == 3:
        q_CK = tl.load(q + key_row, mask=in_keys, other=0.0)
        k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
        dp_CC = tl.load(dpairs + pair, mask=valid[:, None], other=0.0)
        da_CC = dp_CC
        if DELTA:
            da_CC = tl.load(dsystem + pair, mask=valid[:, None], other=0.0)
        total = tl.load(sums + spot, mask=in_keys, other=0.0)
        last = tl.load(sums + last_row * (G * K) + channel, mask=channel < K, other=0.0)
        # Rows beyond the sequence go on from its last, so that no power of theirs is large.
        total = tl.where(valid[:, None], total, last[None, :])
        of_block = tl.minimum(within // SUB * SUB, last_row) * (G * K)
        anchor = tl.load(sums + of_block[:, None] + channel[None, :], mask=(channel < K)[None, :], other=0.0)
        left = tl.exp(tl.minimum(total - anchor, 0.0))
        # Products read what lies otherwise among the threads than what they make: both are held.
        read_total, read_k = total, k_CK.to(tl.float32)
        query_CK = operand(q_CK.to(tl.float32) * left, WIDE, PRECISION)
        step_CK = operand((read_k * step[:, None]).to(k_CK.dtype).to(tl.float32) * left, WIDE, PRECISION)
        row_CK = tl.zeros([C, BK], tl.float32)
        step_row_CK = tl.zeros([C, BK], tl.float32)
        for start in range(0, C, SUB):
            inside = ((within >= start) & (within < start + SUB))[:, None]
            right = _up_to(read_total, sums, start, last_row, channel, within, G, K, SUB)
            key_CK = operand(read_k * right, WIDE, PRECISION)
            # Rows of other blocks may overflow.
            row_CK += tl.where(inside, tl.dot(dp_CC, key_CK, input_precision=PRECISION), 0.0)
            if DELTA:
                step_row_CK += tl.where(inside, tl.dot(da_CC, key_CK, input_precision=PRECISION), 0.0)
        total, k_CK = _as_product(total), _as_product(read_k)
        column_CK = tl.zeros([C, BK], tl.float32)
        for start in range(0, C, SUB):
            inside = ((within >= start) & (within < start + SUB))[:, None]
            right = _up_to(total, sums, start, last_row, channel, within, G, K, SUB)
            written = operand(k_CK * right, WIDE, PRECISION).to(tl.float32)
            inner_CK = tl.where(inside, query_CK, 0.0).to(WIDE)
            column = tl.dot(tl.trans(dp_CC), inner_CK, input_precision=PRECISION)
            column_CK += right * column
            if dlog is not None:
                d_CK -= written * column
            if DELTA:
                inner_CK = tl.where(inside, step_CK, 0.0).to(WIDE)
                column = tl.dot(tl.trans(da_CC), inner_CK, input_precision=PRECISION)
                column_CK += right * column
                if dlog is not None:
                    d_CK -= written * column
    dq_CK = tl.zeros([C, BK], tl.float32)
    dwrite_CK = tl.zeros([C, BK], tl.float32)
    z_CK = tl.zeros([C, BK], tl.float32)
    if dpairs is None:
        # Transposed as well, as a product of its own: compilers have made wrong code of transposed sums.
        dp_CC = _pairs_gradient(do, u, log, sums, g, within, valid, False, G, V, GATE, BV, PRECISION)
        transposed_CC = _pairs_gradient(u, do, log, sums, g, within, valid, True, G, V, GATE, BV, PRECISION)
    # The part of dG that belongs to the chunk's last row: for each channel, or for all of them.
    along = tl.zeros([BK], tl.float32)
    held = 0.0
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        of_values = (within * (G * V))[:, None] + value[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        matrix = channel[None, :] * V + value[:, None]
        in_matrix = (channel < K)[None, :] & (value < V)[:, None] & (length > 0)
        s_VK = tl.load(states + matrix, mask=in_matrix, other=0.0)
        ds_VK = tl.load(dstates + matrix, mask=in_matrix, other=0.0)
        do_CV = tl.load(do + of_values, mask=in_values, other=0.0)
        u_CV = tl.load(u + of_values, mask=in_values, other=0.0)
        s_VK, ds_VK = s_VK.to(do_CV.dtype), ds_VK.to(do_CV.dtype)
        dq_CK = tl.dot(do_CV, s_VK, dq_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(u_CV, ds_VK, dwrite_CK, input_precision=PRECISION)
        if dlog is not None:
            if GATE == 3:
                along += tl.sum(s_VK.to(tl.float32) * ds_VK.to(tl.float32), 0)
            else:
                held += tl.sum(s_VK.to(tl.float32) * ds_VK.to(tl.float32))
        if DELTA:
            dx_CV = tl.load(dx + of_values, mask=in_values, other=0.0)
            z_CK = tl.dot(dx_CV, s_VK, z_CK, input_precision=PRECISION)
    z_CK = -z_CK
    if GATE == 3:
        steps_CK = (k_CK * step[:, None]).to(k.dtype.element_ty)
        # Loaded again, for they would fill the registers of both loops.
        q_CK = _as_product(tl.load(q + key_row, mask=in_keys, other=0.0).to(tl.float32))
        anchor = tl.load(sums + of_block[:, None] + channel[None, :], mask=(channel < K)[None, :], other=0.0)
        left = tl.exp(tl.minimum(total - _as_product(anchor), 0.0))
        read = tl.exp(total)
        dq_CK *= read
        z_CK *= read
        dwrite_CK *= tl.exp(tl.minimum(last[None, :] - total, 0.0))
        if dlog is not None:
            along = along * tl.exp(last) + tl.sum(k_CK * dwrite_CK, 0)
            d_CK += _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA)
            d_CK += operand(q_CK * left, WIDE, PRECISION).to(tl.float32) * row_CK
        dq_CK += left * row_CK
        dwrite_CK += column_CK
        if DELTA:
            if dlog is not None:
                d_CK += operand(steps_CK.to(tl.float32) * left, WIDE, PRECISION).to(tl.float32) * step_row_CK
            z_CK += left * step_row_CK
    else:
        q_CK = tl.load(q + key_row, mask=in_keys, other=0.0)
        k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
        steps_CK = (k_CK.to(tl.float32) * step[:, None]).to(k_CK.dtype)
        if GATE != 0:
            read, write, keep = row_scalings(log, sums, g, within, valid, within, last_row, count, G, GATE)
            dq_CK *= read[:, None]
            z_CK *= read[:, None]
            dwrite_CK *= write[:, None]
            if dlog is not None:
                held = held * keep + tl.sum(k_CK.to(tl.float32) * dwrite_CK)
        if dpairs is not None:
            dp_CC = tl.load(dpairs + pair, mask=valid[:, None], other=0.0)
            transposed_CC = tl.trans(dp_CC)
        dq_CK = tl.dot(dp_CC, k_CK, dq_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(transposed_CC, q_CK, dwrite_CK, input_precision=PRECISION)
        if DELTA:
            da_CC = tl.load(dsystem + pair, mask=valid[:, None], other=0.0)
            dwrite_CK = tl.dot(tl.trans(da_CC), steps_CK, dwrite_CK, input_precision=PRECISION)
            z_CK = tl.dot(da_CC, k_CK, z_CK, input_precision=PRECISION)
        if dlog is not None:
            d_CK = _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA)
    tl.store(dq + spot, dq_CK.to(dq.dtype.element_ty), mask=in_keys)
    if DELTA:
        dstep = tl.sum(k_CK.to(tl.float32) * z_CK, 1)
        if K <= BK:
            dstep += tl.load(dbeta + within * G, mask=valid, other=0.0)
        tl.store(dbeta + within * G, dstep, mask=valid)
        dwrite_CK += z_CK * step[:, None]
    tl.store(dk + spot, dwrite_CK.to(dk.dtype.element_ty), mask=in_keys)
    if dlog is not None:
        last = within == count - 1
        if GATE == 3:
            d_CK += tl.where(last[:, None], along[None, :], 0.0)
            tl.store(dlog + spot, tl.cumsum(d_CK, 0, reverse=True), mask=in_keys)
        elif GATE == 2:
            d_C = tl.sum(d_CK, 1) + tl.where(last, held, 0.0)
            tl.store(dlog + within * G, tl.cumsum(d_C, 0, reverse=True), mask=valid)
        else:
            # A row counts for itself and for all rows before it.
            program = (block.to(tl.int64) * tl.num_programs(1) + chunk) * tl.num_programs(0) + bg
            tl.store(dlog + program, tl.sum((within + 1)[:, None] * d_CK) + count * held)


@triton.jit
def _pairs_gradient(
    x, y, log, sums, g, within, valid, TRANSPOSED: tl.constexpr,
    G: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP [C, C] of scalar decays or none, from dO and U, or its transpose, from U and dO."""
    made = tl.zeros([within.shape[0], within.shape[0]], tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        spot = (within * (G * V))[:, None] + value[None, :]
        mask = valid[:, None] & (value < V)[None, :]
        x_CV = tl.load(x + spot, mask=mask, other=0.0)
        y_CV = tl.load(y + spot, mask=mask, other=0.0)
        made = tl.dot(x_CV, tl.trans(y_CV), made, input_precision=PRECISION)
    if TRANSPOSED:
        pairs = within[:, None] <= within[None, :]
    else:
        pairs = within[:, None] >= within[None, :]
    if GATE != 0:
        total = running_sums(log, sums, g, within, valid, within, G, GATE)
        if TRANSPOSED:
            made *= pair_weights(-total, pairs & valid[None, :])
        else:
            made *= pair_weights(total, pairs & valid[:, None])
    return tl.where(pairs, made, 0.0).to(x.dtype.element_ty)


@triton.jit
def _up_to(
    total, sums, start, last_row, channel, within, G: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Powers e^(a - G_j) of the rows before the end of a block, a the sum in its first row; others 0."""
    anchor = tl.load(sums + tl.minimum(start, last_row) * (G * K) + channel, mask=channel < K, other=0.0)
    before = (within < start + SUB)[:, None]
    return tl.where(before, tl.exp(tl.where(before, tl.minimum(anchor[None, :] - total, 80.0), 0.0)), 0.0)


@triton.jit
def _as_product(value):
    """The same numbers, spread over the threads as those that a product makes: nothing is moved where the two meet."""
    left = tl.zeros([value.shape[0], 16], tl.bfloat16)
    return tl.dot(left, tl.zeros([16, value.shape[1]], tl.bfloat16), value)


@triton.jit
def _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA: tl.constexpr):
    """Gradients of the running sums: what is read at a row less what is written there.

    A pair of rows within the chunk stands on both sides and must cancel: each factor is the one that was rounded for
    the product.
    """
    d_CK = q_CK.to(tl.float32) * dq_CK - k_CK.to(tl.float32) * dwrite_CK
    if DELTA:
        d_CK += steps_CK.to(tl.float32) * z_CK
    return d_CK
