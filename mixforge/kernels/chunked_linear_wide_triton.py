"""The scans of the rule delta over keys that are too wide for a state to stay in registers.

What a chunk writes depends on all channels of the state before it, so that keys cannot be cut into groups, as under rule
add. So the state is where states between chunks are kept for backward in any case: a chunk reads the one before it in
blocks of keys, twice, and writes the next. They are float32 then, and keys may be as wide as you like. The equations are
those of `chunked_linear_triton`.
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from mixforge.kernels.chunked_linear_rows_triton import row_scalings, sequence_place


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan_wide(
    k_read, k_write, v, log, beta, sums, inverse, u, states, first_state, final_state, cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U and the state before each chunk, and the last state: one head of a sequence and a block of value channels."""
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    value, within = block * BV + tl.arange(0, BV), tl.arange(0, C)
    final = final_state + ng.to(tl.int64) * K * V
    for begin in range(0, K, BK):
        channel = begin + tl.arange(0, BK)
        matrix = channel[:, None] * V + value[None, :]
        in_matrix = (channel < K)[:, None] & (value < V)[None, :]
        state_KV = tl.zeros([BK, BV], tl.float32)
        if first_state is not None:
            state_KV += tl.load(first_state + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0)
        tl.store(states + (chunk * G + g) * K * V + matrix, state_KV, mask=in_matrix & (length > 0))
        tl.store(final + matrix, state_KV, mask=in_matrix & (length == 0))
    for start in range(0, length, C):
        # What this program wrote others of its threads read.
        tl.debug_barrier()
        valid = start + within < length
        row = first + start + within
        count = tl.minimum(length - start, C)
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K
        before = states + (chunk * G + g) * K * V
        if (GATE == 1) or (GATE == 2):
            read, write, keep = row_scalings(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        x_CV = tl.zeros([C, BV], tl.float32)
        for begin in range(0, K, BK):
            channel = begin + tl.arange(0, BK)
            in_matrix = (channel < K)[:, None] & (value < V)[None, :]
            k_CK = tl.load(
                k_read + key_row + channel[None, :], mask=valid[:, None] & (channel < K)[None, :], other=0.0
            )
            state_KV = tl.load(before + channel[:, None] * V + value[None, :], mask=in_matrix, other=0.0)
            x_CV = tl.dot(k_CK, state_KV.to(k_CK.dtype), x_CV, input_precision=PRECISION)
        if (GATE == 1) or (GATE == 2):
            x_CV *= read[:, None]
        spot = (row * G + g)[:, None] * V + value[None, :]
        v_CV = tl.load(v + spot, mask=in_values, other=0.0)
        step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
        m_CC = tl.load(inverse + (row * G + g)[:, None] * C + within[None, :], mask=valid[:, None], other=0.0)
        x_CV = (step[:, None] * (v_CV.to(tl.float32) - x_CV)).to(v_CV.dtype)
        u_CV = tl.dot(m_CC, x_CV, input_precision=PRECISION).to(v_CV.dtype)
        tl.store(u + spot, u_CV, mask=in_values)
        if (GATE == 1) or (GATE == 2):
            u_CV = (u_CV.to(tl.float32) * write[:, None]).to(v_CV.dtype)
        is_last = start + C >= length
        for begin in range(0, K, BK):
            channel = begin + tl.arange(0, BK)
            matrix = channel[:, None] * V + value[None, :]
            in_matrix = (channel < K)[:, None] & (value < V)[None, :]
            k_CK = tl.load(
                k_write + key_row + channel[None, :], mask=valid[:, None] & (channel < K)[None, :], other=0.0
            )
            state_KV = tl.load(before + matrix, mask=in_matrix, other=0.0)
            if GATE == 3:
                last = (first + start + count - 1) * G + g
                state_KV *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
            if (GATE == 1) or (GATE == 2):
                state_KV *= keep
            state_KV = tl.dot(tl.trans(k_CK), u_CV, state_KV, input_precision=PRECISION)
            tl.store(before + G * K * V + matrix, state_KV, mask=in_matrix & (is_last == 0))
            tl.store(final + matrix, state_KV, mask=in_matrix & is_last)
        chunk += 1


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan_backward_wide(
    q_read, k_read, k_write, log, beta, sums, pairs, inverse, do, dx, dstates, dfinal, dfirst, cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX and the gradient of the state after each chunk, from the last chunk to the first."""
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    value, within = block * BV + tl.arange(0, BV), tl.arange(0, C)
    into = dfirst + ng.to(tl.int64) * K * V
    chunks = tl.cdiv(length, C)
    for begin in range(0, K, BK):
        channel = begin + tl.arange(0, BK)
        matrix = channel[:, None] * V + value[None, :]
        in_matrix = (channel < K)[:, None] & (value < V)[None, :]
        dstate_KV = tl.zeros([BK, BV], tl.float32)
        if dfinal is not None:
            dstate_KV = tl.load(dfinal + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0)
        place = dstates + ((chunk + chunks - 1) * G + g) * K * V
        tl.store(place + matrix, dstate_KV, mask=in_matrix & (length > 0))
        tl.store(into + matrix, dstate_KV, mask=in_matrix & (length == 0))
    for back in range(0, chunks):
        tl.debug_barrier()
        c = chunks - 1 - back
        start = c * C
        valid = start + within < length
        row = first + start + within
        count = tl.minimum(length - start, C)
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K
        after = dstates + ((chunk + c) * G + g) * K * V
        if (GATE == 1) or (GATE == 2):
            read, write, keep = row_scalings(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        du_CV = tl.zeros([C, BV], tl.float32)
        for begin in range(0, K, BK):
            channel = begin + tl.arange(0, BK)
            in_matrix = (channel < K)[:, None] & (value < V)[None, :]
            k_CK = tl.load(
                k_write + key_row + channel[None, :], mask=valid[:, None] & (channel < K)[None, :], other=0.0
            )
            dstate_KV = tl.load(after + channel[:, None] * V + value[None, :], mask=in_matrix, other=0.0)
            du_CV = tl.dot(k_CK, dstate_KV.to(k_CK.dtype), du_CV, input_precision=PRECISION)
        spot = (row * G + g)[:, None] * V + value[None, :]
        do_CV = tl.load(do + spot, mask=in_values, other=0.0)
        pair = (row * G + g)[:, None] * C + within[None, :]
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0)
        if (GATE == 1) or (GATE == 2):
            du_CV *= write[:, None]
        du_CV = tl.dot(tl.trans(p_CC), do_CV, du_CV, input_precision=PRECISION)
        m_CC = tl.load(inverse + pair, mask=valid[:, None], other=0.0)
        du_CV = tl.dot(tl.trans(m_CC), du_CV.to(do_CV.dtype), input_precision=PRECISION)
        tl.store(dx + spot, du_CV.to(dx.dtype.element_ty), mask=in_values)
        # Negative, so that the product can be added to what is there.
        factor = -tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
        if (GATE == 1) or (GATE == 2):
            factor *= read
            do_CV = (do_CV.to(tl.float32) * read[:, None]).to(do_CV.dtype)
        dvalue_CV = (factor[:, None] * du_CV).to(do_CV.dtype)
        for begin in range(0, K, BK):
            channel = begin + tl.arange(0, BK)
            matrix = channel[:, None] * V + value[None, :]
            in_keys = valid[:, None] & (channel < K)[None, :]
            in_matrix = (channel < K)[:, None] & (value < V)[None, :]
            dstate_KV = tl.load(after + matrix, mask=in_matrix, other=0.0)
            if GATE == 3:
                last = (first + start + count - 1) * G + g
                dstate_KV *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
            if (GATE == 1) or (GATE == 2):
                dstate_KV *= keep
            q_CK = tl.load(q_read + key_row + channel[None, :], mask=in_keys, other=0.0)
            dstate_KV = tl.dot(tl.trans(q_CK), do_CV, dstate_KV, input_precision=PRECISION)
            k_CK = tl.load(k_read + key_row + channel[None, :], mask=in_keys, other=0.0)
            dstate_KV = tl.dot(tl.trans(k_CK), dvalue_CV, dstate_KV, input_precision=PRECISION)
            tl.store(after - G * K * V + matrix, dstate_KV, mask=in_matrix & (c > 0))
            tl.store(into + matrix, dstate_KV, mask=in_matrix & (c == 0))


@triton.jit
def linear_step_wide(
    q, k, v, log, beta, state, o,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, ROW: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, a block of value channels; the state, rows of ROW, in place, by blocks of keys twice."""
    bg, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = bg % G
    value = block * BV + tl.arange(0, BV)
    in_values = value < V
    key = (bg // G * H + g // (G // H)) * K
    keep = 1.0
    if GATE == 1:
        keep = tl.exp(tl.load(log + g).to(tl.float32))
    if GATE == 2:
        keep = tl.exp(tl.load(log + bg).to(tl.float32))
    read_V = tl.zeros([BV], tl.float32)
    for begin in range(0, K, BK):
        channel = begin + tl.arange(0, BK)
        in_keys = channel < K
        place = (bg * K + channel)[:, None] * ROW + value[None, :]
        s_KV = keep * tl.load(state + place, mask=in_keys[:, None] & in_values[None, :], other=0.0)
        k_K = tl.load(k + key + channel, mask=in_keys, other=0.0).to(tl.float32)
        if GATE == 3:
            k_K *= tl.exp(tl.load(log + bg * K + channel, mask=in_keys, other=0.0).to(tl.float32))
        read_V += tl.sum(k_K[:, None] * s_KV, 0)
    # All of the state is read before any of it is written.
    tl.debug_barrier()
    u_V = tl.load(v + bg * V + value, mask=in_values, other=0.0).to(tl.float32)
    u_V = tl.load(beta + bg).to(tl.float32) * (u_V - read_V)
    o_V = tl.zeros([BV], tl.float32)
    for begin in range(0, K, BK):
        channel = begin + tl.arange(0, BK)
        in_keys = channel < K
        place = (bg * K + channel)[:, None] * ROW + value[None, :]
        in_matrix = in_keys[:, None] & in_values[None, :]
        s_KV = keep * tl.load(state + place, mask=in_matrix, other=0.0)
        if GATE == 3:
            s_KV *= tl.exp(tl.load(log + bg * K + channel, mask=in_keys, other=0.0).to(tl.float32))[:, None]
        k_K = tl.load(k + key + channel, mask=in_keys, other=0.0).to(tl.float32)
        s_KV += k_K[:, None] * u_V[None, :]
        tl.store(state + place, s_KV, mask=in_matrix)
        q_K = tl.load(q + key + channel, mask=in_keys, other=0.0).to(tl.float32)
        o_V += tl.sum(q_K[:, None] * s_KV, 0)
    tl.store(o + bg * V + value, o_V.to(o.dtype.element_ty), mask=in_values)
