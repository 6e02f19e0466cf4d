"""Linear recurrences whose transition is a decay and a rank-one removal, with a key of its own for each.

For each head, with state S [K, V], log decay g [K], removal key a and removal strength b [K]:

    S_t = Diag(e^g_t) S_{t-1} - b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = q_t^T S_t

The removal reads the state before its decay. In a chunk of L tokens that starts from S0, with G the running sum of g,
G~ the sum before a row, and gram(X, Y)_ij = sum over c of X_ic Y_jc e^(exponent of row i - G_jc):

    (I + A) U = reading(a) S0 + B V     A, B = gram(a, b), gram(a, k) with G~, for i > j
    O = reading(q) S0 + gram(q, k) V - gram(q, b) U                  with G, for i >= j
    S1 = e^{G_L} S0 + sum over j of e^{G_L - G_j} (k_j v_j^T - b_j u_j^T)

All forms take q_BTHK, k_BTHK, v_BTHV, log decays decay_BTHK in [-5, 0] or None, removal_BTHRK with a and b in the two
places of R, and the state_BHKV before the first token, None for zeros. They return o_BTHV in the dtype of v and the
final state. States and everything between are float32, or float64 where v is. Chunks have 16 rows and their first row
is the anchor of all exponents, so that no power passes e^75. They raise ValueError where a shape, dtype or device does
not fit or, on a CPU, a decay leaves its range.

Source: Peng et al. 2025 (arXiv 2503.14456), section 4 and appendix on the chunked form; Yang et al. 2024
(arXiv 2406.06484), section 3.2, for products of rank-one transitions. Departure: U is made chunk by chunk, from a
system that is solved by substitution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunked_linear import CHANNEL_CHUNK, CHANNEL_FLOOR, first_state
from mixforge.kernels.operands import check_alike, check_log, check_shape
from mixforge.kernels.twofold_linear import check_equal_heads, cut


def dplr_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor | None,
    removal_BTHRK: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other."""
    check_dplr(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, removal_BTHRK, state_BHKV)
    state = first_state(q_BTHK, v_BTHV, state_BHKV)
    decay = torch.zeros_like(q_BTHK) if decay_BTHK is None else decay_BTHK
    inputs = (x.to(state.dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, decay, removal_BTHRK))
    outputs = []
    for q_BHK, k_BHK, v_BHV, g_BHK, removal_BHRK in zip(*inputs, strict=True):
        state = _moved(k_BHK, v_BHV, g_BHK, removal_BHRK, state)
        outputs.append((q_BHK[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1).to(v_BTHV.dtype), state


def dplr_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    decay_BHK: Tensor | None,
    removal_BHRK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (o_BHV, state_BHKV).

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_dplr(q_BHK, k_BHK, v_BHV, decay_BHK, removal_BHRK, state_BHKV, is_step=True)
    dtype = state_BHKV.dtype
    decay = None if decay_BHK is None else decay_BHK.to(dtype)
    state = _moved(k_BHK.to(dtype), v_BHV.to(dtype), decay, removal_BHRK.to(dtype), state_BHKV)
    return (q_BHK.to(dtype)[..., None, :] @ state)[..., 0, :].to(v_BHV.dtype), state


def _moved(k: Tensor, v: Tensor, decay: Tensor | None, removal: Tensor, state: Tensor) -> Tensor:
    """The state one token later."""
    a_BHK, b_BHK = removal.unbind(-2)
    read_BHV = (a_BHK[..., None, :] @ state)[..., 0, :]
    kept = state if decay is None else decay.exp()[..., None] * state
    return kept - b_BHK[..., :, None] * read_BHV[..., None, :] + k[..., :, None] * v[..., None, :]


def dplr_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor | None,
    removal_BTHRK: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks, as matrix products; only two products of a chunk wait for the chunk before."""
    check_dplr(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, removal_BTHRK, state_BHKV)
    batch, length, heads, value_dim = v_BTHV.shape
    key_dim = q_BTHK.shape[3]
    state = first_state(q_BTHK, v_BTHV, state_BHKV)
    a_BTHK, b_BTHK = removal_BTHRK.unbind(-2)
    given = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    # [C, B * H, L, *]
    q, k, v, a, b = (cut(x.to(state.dtype), CHANNEL_CHUNK, heads).flatten(1, 2) for x in given)
    keep: list[Tensor | None] = [None] * len(q)
    if decay_BTHK is None:
        read_a, read_q = a, q
        rows, columns = torch.cat([a, q], 2), torch.cat([b, k], 2)
        leaving = columns
    else:
        g = cut(decay_BTHK.to(state.dtype), CHANNEL_CHUNK, heads).flatten(1, 2)
        total, first = g.cumsum(-2), g[..., :1, :]
        before, last = total - g, total[..., -1:, :]
        rows = torch.cat([a * (before - first).exp(), q * (total - first).exp()], 2)
        right, away = (first - total).exp(), (last - total).exp()
        columns = torch.cat([b * right, k * right], 2)
        leaving = torch.cat([b * away, k * away], 2)
        read_a, read_q = a * before.exp(), q * total.exp()
        keep = list(last.mT.exp().unbind())
    size = CHANNEL_CHUNK
    grams = rows @ columns.mT
    system, removed_b = grams[..., :size, :size], grams[..., size:, :size].tril()
    removed_k, within = grams[..., :size, size:].tril(-1), grams[..., size:, size:].tril()
    unit = torch.eye(size, dtype=state.dtype, device=state.device)
    # The solver reads what is below the diagonal, and takes the diagonal for ones.
    inverse = torch.linalg.solve_triangular(
        system.tril(-1) + unit, unit, upper=False, left=False, unitriangular=True
    )
    read_a = inverse @ read_a
    from_values = inverse @ (removed_k @ v)
    flat = state.flatten(0, 1)
    states, removed = [], []
    parts = (read_a.unbind(), from_values.unbind(), leaving.mT.unbind(), v.unbind(), keep)
    for read, start, leave, values, kept in zip(*parts, strict=True):
        states.append(flat)
        u = torch.baddbmm(start, read, flat)
        removed.append(u)
        flat = torch.baddbmm(flat if kept is None else kept * flat, leave, torch.cat([-u, values], 1))
    o = read_q @ torch.stack(states)
    o = o + torch.cat([-removed_b, within], -1) @ torch.cat([torch.stack(removed), v], 2)
    o = o.view(-1, batch, heads, size, value_dim).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :length].to(v_BTHV.dtype), flat.view(batch, heads, key_dim, value_dim)


def matmul_flops(length: int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Matmul FLOPs of the torch form's forward pass over one sequence, two for each multiply-add; padding counts."""
    size = CHANNEL_CHUNK
    grams = 4 * size * size * key_dim
    solved = size * size * (key_dim + 2 * value_dim)
    passed = 3 * size * key_dim * value_dim
    read = size * key_dim * value_dim + 2 * size * size * value_dim
    return 2 * -(-length // size) * heads * (grams + solved + passed + read)


def check_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    removal: Tensor,
    state: Tensor | None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a decay leaves its range."""
    check_equal_heads(q, k, v, state, is_step=is_step)
    check_shape("decay", decay, q.shape)
    check_shape("removal", removal, (*q.shape[:-1], 2, q.shape[-1]))
    check_alike(q=q, k=k, v=v, decay=decay, removal=removal, state=state)
    if decay is not None and not is_step:
        check_log("decay", decay, CHANNEL_FLOOR)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"reference": dplr_reference, "torch": dplr_torch}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend. Raises ValueError for triton where Triton is not installed."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("dplr", "dplr_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("dplr_step", "dplr_step_triton")
        return found
    return dplr_step
