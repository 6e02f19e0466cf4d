"""The backward kernels of the recurrences in `dplr_triton`, which has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from mixforge.kernels.dplr_forward_triton import chunk_powers, chunk_rows, load_rows, store_rows


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_scan_backward(
    q_read, k_write, a_read, b_write, keep, pairs, removed, solved, v, log, u, o, do, dfinal,
    dstates, du, dv, dlog, dstate, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the values, of u and of the states of one head from the last chunk to the first, a block of value
    channels; and of the decays of the values all but what they keep of the state before a chunk.

    The gradient of a state is [V, K], so that it and what is made of it are left operands: they stay in registers.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    in_matrix = (value < V)[:, None] & (channel < K)[None, :]
    outer = channel[None, :] * V + value[:, None]
    head = bh.to(tl.int64)
    if dfinal is None:
        ds_VK = tl.zeros([BV, KP], tl.float32)
    else:
        ds_VK = tl.load(dfinal + head * K * V + outer, mask=in_matrix, other=0.0).to(tl.float32)
    if KEY:
        kept_K = tl.load(keep + (head * NC + NC - 1) * K + channel, mask=channel < K, other=0.0)
    for back in range(0, NC):
        c = NC - 1 - back
        chunk = head * NC + c
        row, valid = chunk_rows(bh, c, T, H, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key = row[:, None] * K + channel[None, :]
        pair = row[:, None] * C + within[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, away, read, _, last = chunk_powers(log, spot, in_values, C, BV, VALUE)
        inner, right, away, read = tl.trans(inner), tl.trans(right), tl.trans(away), tl.trans(read)
        k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
        after = ds_VK.to(k_CK.dtype)
        tl.store(dstates + chunk * K * V + value[:, None] * K + channel[None, :], after, mask=in_matrix)
        do_VC = tl.trans(load_rows(do, spot, in_values))
        inner_VC, read_VC = (do_VC * inner).to(WIDE), (do_VC * read).to(k_CK.dtype)
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0).to(WIDE)
        dlast_VC = away * tl.dot(after, tl.trans(k_CK), input_precision=PRECISION)
        dv_VC = dlast_VC + right * tl.dot(inner_VC, p_CC, input_precision=WIDE_PRECISION)
        if VALUE:
            v_VC = tl.trans(load_rows(v, spot, in_values))
            along = tl.sum(v_VC * dlast_VC, 1)
            ds_VK *= last[:, None]
        if KEY:
            ds_VK *= kept_K[None, :]
            # That of the chunk before, so that none is waited for; only what products take comes in stages.
            kept_K = tl.load(keep + (chunk - 1) * K + channel, mask=(channel < K) & (c > 0), other=0.0)
        q_CK = tl.load(q_read + key, mask=in_keys, other=0.0)
        ds_VK = tl.dot(read_VC, q_CK, ds_VK, input_precision=PRECISION)
        if REMOVE:
            b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
            w_CK = tl.load(a_read + key, mask=in_keys, other=0.0)
            r_CC = tl.load(removed + pair, mask=valid[:, None], other=0.0).to(WIDE)
            n_CC = tl.load(solved + pair, mask=valid[:, None], other=0.0).to(WIDE)
            dlast_VC = away * tl.dot(after, tl.trans(b_CK), input_precision=PRECISION)
            if VALUE:
                along -= tl.sum(tl.trans(load_rows(u, spot, in_values)) * dlast_VC, 1)
            du_VC = -dlast_VC - right * tl.dot(inner_VC, r_CC, input_precision=WIDE_PRECISION)
            # As it is stored, and read again.
            du_VC = du_VC.to(du.dtype.element_ty)
            tl.store(du + spot, tl.trans(du_VC), mask=in_values)
            du_VC = du_VC.to(tl.float32)
            dv_VC += right * tl.dot((du_VC * inner).to(WIDE), n_CC, input_precision=WIDE_PRECISION)
            ds_VK = tl.dot((du_VC * read).to(k_CK.dtype), w_CK, ds_VK, input_precision=PRECISION)
        store_rows(dv, spot, tl.trans(dv_VC), in_values)
        if VALUE:
            dh_VC = do_VC * tl.trans(load_rows(o, spot, in_values)) - v_VC * dv_VC
            dh_VC += tl.where((within == C - 1)[None, :], along[:, None], 0.0)
            tl.store(dlog + spot, tl.trans(tl.cumsum(dh_VC, 1, reverse=True)), mask=in_values)
    tl.store(dstate + head * K * V + outer, ds_VK, mask=in_matrix)


@triton.jit
def _moved(
    s_KV, k_write, b_write, keep, v, log, u, bh, c, channel, value, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk, from that before it."""
    row, valid = chunk_rows(bh, c, T, H, C)
    in_keys = valid[:, None] & (channel < K)[None, :]
    in_values = valid[:, None] & (value < V)[None, :]
    key = row[:, None] * K + channel[None, :]
    spot = row[:, None] * V + value[None, :]
    v_CV = load_rows(v, spot, in_values)
    k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
    if REMOVE:
        u_CV = load_rows(u, spot, in_values)
        b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
    if KEY:
        s_KV *= tl.load(keep + (bh * NC + c) * K + channel, mask=channel < K, other=0.0)[:, None]
    _, _, away, _, _, last = chunk_powers(log, spot, in_values, C, BV, VALUE)
    if VALUE:
        s_KV *= last[None, :]
    s_KV = tl.dot(tl.trans(k_CK), (v_CV * away).to(k_CK.dtype), s_KV, input_precision=PRECISION)
    if REMOVE:
        s_KV = tl.dot(tl.trans(b_CK), (-u_CV * away).to(k_CK.dtype), s_KV, input_precision=PRECISION)
    return s_KV


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_pairs_backward(
    k_write, b_write, keep, v, log, u, states, do, dstates, du,
    dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved, dlog, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what `dplr_pairs` makes of one chunk and head, and the rest of those of the decays of its values."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    within = tl.arange(0, C)
    row, valid = chunk_rows(bh, c, T, H, C)
    dp_CC = tl.zeros([C, C], tl.float32)
    dr_CC = tl.zeros([C, C], tl.float32)
    dn_CC = tl.zeros([C, C], tl.float32)
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        in_values = valid[:, None] & (value < V)[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, _, _, _, _ = chunk_powers(log, spot, in_values, C, BV, VALUE)
        inner_CV = (load_rows(do, spot, in_values) * inner).to(WIDE)
        right_VC = tl.trans((load_rows(v, spot, in_values) * right).to(WIDE))
        dp_CC = tl.dot(inner_CV, right_VC, dp_CC, input_precision=WIDE_PRECISION)
        if REMOVE:
            u_VC = tl.trans((-load_rows(u, spot, in_values) * right).to(WIDE))
            dr_CC = tl.dot(inner_CV, u_VC, dr_CC, input_precision=WIDE_PRECISION)
            du_CV = (load_rows(du, spot, in_values) * inner).to(WIDE)
            dn_CC = tl.dot(du_CV, right_VC, dn_CC, input_precision=WIDE_PRECISION)
    causal = within[:, None] >= within[None, :]
    pair = row[:, None] * C + within[None, :]
    store_rows(dpairs, pair, tl.where(causal, dp_CC, 0.0), valid[:, None])
    if REMOVE:
        store_rows(dremoved, pair, tl.where(causal, dr_CC, 0.0), valid[:, None])
        store_rows(dsolved, pair, tl.where(causal, dn_CC, 0.0), valid[:, None])
    for start in tl.range(0, K, BK, num_stages=1):
        channel = start + tl.arange(0, BK)
        dq_KC = tl.zeros([BK, C], tl.float32)
        dk_KC = tl.zeros([BK, C], tl.float32)
        da_KC = tl.zeros([BK, C], tl.float32)
        db_KC = tl.zeros([BK, C], tl.float32)
        dkept_K = tl.zeros([BK], tl.float32)
        for first in tl.range(0, V, BV, num_stages=1):
            value = first + tl.arange(0, BV)
            matrix = value[:, None] * K + channel[None, :]
            in_matrix = (value < V)[:, None] & (channel < K)[None, :]
            in_values = valid[:, None] & (value < V)[None, :]
            spot = row[:, None] * V + value[None, :]
            group = (bh * tl.cdiv(NC, GROUP) + c // GROUP) * K * V
            # All that is loaded of the chunk comes before the first wait.
            s_KV = tl.trans(load_rows(states, group + matrix, in_matrix))
            after = tl.trans(tl.load(dstates + program * K * V + matrix, mask=in_matrix, other=0.0))
            v_CV, do_CV = load_rows(v, spot, in_values), load_rows(do, spot, in_values)
            if REMOVE:
                u_CV, du_CV = load_rows(u, spot, in_values), load_rows(du, spot, in_values)
            _, _, away, read, _, last = chunk_powers(log, spot, in_values, C, BV, VALUE)
            v_VC = tl.trans((v_CV * away).to(after.dtype))
            do_VC = tl.trans((do_CV * read).to(after.dtype))
            dk_KC = tl.dot(after, v_VC, dk_KC, input_precision=PRECISION)
            if REMOVE:
                u_VC = tl.trans((-u_CV * away).to(after.dtype))
                du_VC = tl.trans((du_CV * read).to(after.dtype))
                db_KC = tl.dot(after, u_VC, db_KC, input_precision=PRECISION)
            for j in range(c // GROUP * GROUP, c):
                s_KV = _moved(
                    s_KV, k_write, b_write, keep, v, log, u, bh, j, channel, value, T, NC,
                    H, K, V, KEY, VALUE, REMOVE, C, BV, PRECISION,
                )  # fmt: skip
            before = s_KV.to(after.dtype)
            dq_KC = tl.dot(before, do_VC, dq_KC, input_precision=PRECISION)
            if REMOVE:
                da_KC = tl.dot(before, du_VC, da_KC, input_precision=PRECISION)
            if KEY or VALUE:
                kept_KV = s_KV * after.to(tl.float32)
            if VALUE:
                kept_KV *= last[None, :]
            if KEY:
                dkept_K += tl.sum(kept_KV, 1)
            if VALUE:
                if KEY:
                    kept_KV *= tl.load(keep + program * K + channel, mask=channel < K, other=0.0)[:, None]
                dh_CV = tl.load(dlog + spot, mask=in_values, other=0.0) + tl.sum(kept_KV, 0)[None, :]
                tl.store(dlog + spot, dh_CV, mask=in_values)
        # Keys are [K, C], as the rows of a state are key channels.
        in_keys = (channel < K)[:, None] & valid[None, :]
        key = row[None, :] * K + channel[:, None]
        store_rows(dq_read, key, dq_KC, in_keys)
        store_rows(dk_write, key, dk_KC, in_keys)
        if REMOVE:
            store_rows(da_read, key, da_KC, in_keys)
            store_rows(db_write, key, db_KC, in_keys)
        if KEY:
            tl.store(dkeep + program * K + channel, dkept_K, mask=channel < K)


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_gradients(
    q, k, removal, log, keep, a_read, solved, inverse, dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved,
    dsolved, dq, dk, dremoval, dlog, T, NC,
    H: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, REMOVE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dg of one chunk and head. With M' and N' for M and N turned, dE = M' dN and
    dA = -M' (dW W' + dN N'), below the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    row, valid = chunk_rows(bh, c, T, H, C)
    within = tl.arange(0, C)
    pair = row[:, None] * C + within[None, :]
    turned = row[None, :] * C + within[:, None]
    dp_CC = load_rows(dpairs, pair, valid[:, None]).to(WIDE)
    # What is turned is loaded or made so: no product takes a sum of products that is turned.
    dp_turned = load_rows(dpairs, turned, valid[None, :]).to(WIDE)
    if REMOVE:
        da_CC = tl.zeros([C, C], tl.float32)
        da_turned = tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            mask = valid[:, None] & (channel < K)[None, :]
            spot = row[:, None] * K + channel[None, :]
            w_CK = load_rows(a_read, spot, mask)
            dw_CK = load_rows(da_read, spot, mask)
            da_CC = tl.dot(dw_CK, tl.trans(w_CK), da_CC, input_precision=SOLVE)
            da_turned = tl.dot(w_CK, tl.trans(dw_CK), da_turned, input_precision=SOLVE)
        dn_CC = load_rows(dsolved, pair, valid[:, None])
        dn_turned = load_rows(dsolved, turned, valid[None, :])
        n_CC, n_turned = load_rows(solved, pair, valid[:, None]), load_rows(solved, turned, valid[None, :])
        m_CC, m_turned = load_rows(inverse, pair, valid[:, None]), load_rows(inverse, turned, valid[None, :])
        da_CC = tl.dot(m_turned, tl.dot(dn_CC, n_turned, da_CC, input_precision=SOLVE), input_precision=SOLVE)
        da_turned = tl.dot(n_CC, dn_turned, da_turned, input_precision=SOLVE)
        da_turned = tl.dot(da_turned, m_CC, input_precision=SOLVE)
        de_CC = tl.dot(m_turned, dn_CC, input_precision=SOLVE)
        de_turned = tl.dot(dn_turned, m_CC, input_precision=SOLVE)
        below, above = within[:, None] > within[None, :], within[:, None] < within[None, :]
        da_CC = tl.where(below, -da_CC, 0.0).to(WIDE)
        de_CC = tl.where(below, de_CC, 0.0).to(WIDE)
        da_turned = tl.where(above, -da_turned, 0.0).to(WIDE)
        de_turned = tl.where(above, de_turned, 0.0).to(WIDE)
        dr_CC = load_rows(dremoved, pair, valid[:, None]).to(WIDE)
        dr_turned = load_rows(dremoved, turned, valid[None, :]).to(WIDE)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        # All that is loaded comes before the first wait.
        q_CK, k_CK = load_rows(q, spot, mask), load_rows(k, spot, mask)
        dread_CK, dwrite_CK = load_rows(dq_read, spot, mask), load_rows(dk_write, spot, mask)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK, b_CK = load_rows(removal, place, mask), load_rows(removal, place + K, mask)
            dw_CK, dbwrite_CK = load_rows(da_read, spot, mask), load_rows(db_write, spot, mask)
        if KEY:
            kept_K = tl.load(keep + program * K + channel, mask=channel < K, other=0.0)
            dkept_K = tl.load(dkeep + program * K + channel, mask=channel < K, other=0.0)
        left, right, away, read, back, _ = chunk_powers(log, spot, mask, C, BK, KEY)
        q_left, k_right = (q_CK * left).to(WIDE), (k_CK * right).to(WIDE)
        dq_left = tl.dot(dp_CC, k_right, input_precision=PRECISION)
        dk_right = tl.dot(dp_turned, q_left, input_precision=PRECISION)
        dk_away = away * dwrite_CK
        if KEY:
            along = tl.sum(k_CK * dk_away, 0)
        if REMOVE:
            a_left, b_right = (a_CK * left * back).to(WIDE), (b_CK * right).to(WIDE)
            dq_left = tl.dot(dr_CC, b_right, dq_left, input_precision=PRECISION)
            dk_right = tl.dot(de_turned, a_left, dk_right, input_precision=PRECISION)
            da_left = tl.dot(da_CC, b_right, input_precision=PRECISION)
            da_left = tl.dot(de_CC, k_right, da_left, input_precision=PRECISION)
            db_right = tl.dot(dr_turned, q_left, input_precision=PRECISION)
            db_right = tl.dot(da_turned, a_left, db_right, input_precision=PRECISION)
            da_CK = back * (left * da_left + read * tl.dot(m_turned, dw_CK, input_precision=SOLVE))
            db_away = away * dbwrite_CK
            db_CK = right * db_right + db_away
            store_rows(dremoval, place, da_CK, mask)
            store_rows(dremoval, place + K, db_CK, mask)
        dq_CK = left * dq_left + read * dread_CK
        dk_CK = right * dk_right + dk_away
        store_rows(dq, spot, dq_CK, mask)
        store_rows(dk, spot, dk_CK, mask)
        if KEY:
            dg_CK = q_CK * dq_CK - k_CK * dk_CK
            along += dkept_K * kept_K
            if REMOVE:
                # a is scaled by the sum before its row.
                dg_CK += a_CK * da_CK - b_CK * db_CK
                along += tl.sum(b_CK * db_away, 0)
            dg_CK += tl.where((within == C - 1)[:, None], along[None, :], 0.0)
            dg_CK = tl.cumsum(dg_CK, 0, reverse=True)
            if REMOVE:
                dg_CK -= a_CK * da_CK
            tl.store(dlog + spot, dg_CK, mask=mask)
