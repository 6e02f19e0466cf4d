"""Linear recurrences whose past is kept in a state for each level of a Fenwick tree.

At token t, from 0, each bit b that is set in t has a bucket of the 2^b tokens before t - t mod 2^(b+1) + 2^b; the token
itself is level 0, the bucket of bit b level b + 1, so that token j < t is at level bit_length(t xor j). For each head:

    S^l_t = sum over j in the bucket of (product of A_i for j < i <= t) k_j w_j^T       l level of the bucket
    A_t = e^g_t, w = v                                          rule add
    A_t = e^g_t (I - beta_t k_t k_t^T), w = beta v              rule delta
    o_t = sum over l of weight_tl q_t^T S^l_t

One token: every state is moved by A_t; the token's own state and those of the bits that are ones at the end of t become
one, that of the first bit that is zero. In chunks of C = 32 tokens: inside a chunk the matrix from values to outputs is
made and weighed by level; the states of the bits of the chunk's number are read and moved as the chunk moves any state.
A sequence that begins or ends within a chunk has a part of one: what it has not neither decays nor writes, and the states
of the lower bits, of buckets within the chunk, are read with a weight for each row, and made of the rows that are theirs.

All forms take q_BTHK (scaled), k_BTHK, v_BTGV with a multiple of their heads, log decays [G], [B, T, G] or None, beta_BTG
or None for the rule add, weight_BTGE for levels 0 to E - 1 (that of the last also for all above), the state_BGNKV of N
bits or None at the start of a sequence, and the number of tokens before. They return o_BTGV and the state, which is None
where none was given. A state with N bits holds 2^N - 1 tokens. They raise ValueError where a shape does not fit.

Source: Guo et al. 2025 (arXiv 2506.04761), sections 3.1 to 3.4; fla's naive_log_linear_attn for the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunk_gates import FLOOR
from mixforge.kernels.operands import check_axes, check_heads, check_shape
from mixforge.kernels.tracing import fixed
from mixforge.kernels.twofold_linear import cut

CHUNK_BITS = 5
CHUNK = 1 << CHUNK_BITS


def log_linear_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_BGNKV: Tensor | None,
    weight_BTGE: Tensor,
    start: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """One token after the other."""
    check_levels(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGNKV, weight_BTGE)
    batch, length, heads, value_dim = v_BTGV.shape
    state = state_BGNKV
    if state is None:
        bits = (start + length).bit_length()
        exact = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
        state = v_BTGV.new_zeros(batch, heads, bits, q_BTHK.shape[3], value_dim, dtype=exact)
    outputs = []
    for t in range(length):
        now = decay if decay is None or decay.dim() == 1 else decay[:, t]
        beta = None if beta_BTG is None else beta_BTG[:, t]
        at = torch.tensor(start + t, device=v_BTGV.device)
        o_BGV, state = log_linear_step(
            q_BTHK[:, t], k_BTHK[:, t], v_BTGV[:, t], now, beta, state, weight_BTGE[:, t], at
        )
        outputs.append(o_BGV)
    return torch.stack(outputs, 1), None if state_BGNKV is None else state


def check_levels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    weight: Tensor,
) -> None:
    """Raise ValueError where a shape does not fit."""
    check_heads(q, k, v)
    tokens, heads = v.shape[:3], v.shape[2]
    check_shape("decay", decay, (heads,), tokens)
    check_shape("beta", beta, tokens)
    check_shape("weight", weight, (*tokens, "levels"))
    check_axes("weight", weight, "batch, time, heads, levels")
    check_shape("state", state, (len(v), heads, "bits", k.shape[3], v.shape[3]))


def log_linear_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    beta_BG: Tensor | None,
    state_BGNKV: Tensor,
    weight_BGE: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (o_BGV, state_BGNKV). `position` is a tensor, so that nothing waits for its value."""
    dtype, count = state_BGNKV.dtype, state_BGNKV.shape[2]
    group = v_BGV.shape[1] // q_BHK.shape[1]
    q, k = (x.to(dtype).repeat_interleave(group, 1) for x in (q_BHK, k_BHK))
    levels = torch.arange(count, device=q.device)
    is_set_N = ((position >> levels) & 1).to(dtype)
    state = state_BGNKV * is_set_N[:, None, None]
    if decay_now is not None:
        state = decay_now.to(dtype).exp()[..., None, None, None] * state
    write = v_BGV.to(dtype)
    if beta_BG is not None:
        beta = beta_BG.to(dtype)[..., None]
        met_BGNV = (k[:, :, None, None] @ state)[..., 0, :]
        state = state - k[:, :, None, :, None] * (beta[..., None] * met_BGNV)[..., None, :]
        write = beta * write
    own_BGKV = k[..., :, None] * write[..., None, :]
    read_BGNV = (q[:, :, None, None] @ state)[..., 0, :]
    weight = weight_BGE.to(dtype)
    of_levels = weight.index_select(2, (levels + 1).clamp(max=weight.shape[2] - 1))
    own_BGV = (q[..., None, :] @ own_BGKV)[..., 0, :]
    o_BGV = weight[..., :1] * own_BGV + (of_levels[..., None] * read_BGNV).sum(2)
    # Ones at the end of the position, and the first zero above them.
    ends_N = is_set_N.cumprod(0)
    before_N = torch.cat([torch.ones_like(ends_N[:1]), ends_N[:-1]])
    first_N = before_N - ends_N
    merged = own_BGKV + (ends_N[:, None, None] * state).sum(2)
    state = (1 - ends_N)[:, None, None] * state + first_N[:, None, None] * merged[:, :, None]
    return o_BGV.to(v_BGV.dtype), state


def log_linear_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_BGNKV: Tensor | None,
    weight_BTGE: Tensor,
    start: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """In chunks, as matrix products."""
    check_levels(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGNKV, weight_BTGE)
    batch, length = len(v_BTGV), fixed(v_BTGV.shape[1])
    inner, pairs = inside(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, weight_BTGE, start)
    passing = passed(pairs)
    added = passing.leaving.mT @ pairs.write
    buckets, at, end = opened(state_BGNKV, start), start, start + length
    outputs = []
    for chunk, (o, each, weight) in enumerate(zip(inner, added, pairs.weight, strict=True)):
        if buckets:
            seen, buckets = crossed(passing, chunk, buckets, weight, at)
            o = o + seen
        outputs.append(o)
        later = (at // CHUNK + 1) * CHUNK
        own = {(later ^ later - 1).bit_length() - 1: each}
        if later > end and state_BGNKV is not None:
            own, later = left(pairs, passing.leaving[-1], end), end
        buckets, at = together(buckets, at, own, later), later
    o_BTGV = joined(torch.stack(outputs), batch, start, length).to(v_BTGV.dtype)
    return o_BTGV, None if state_BGNKV is None else held(buckets, torch.zeros_like(state_BGNKV))


class Pairs(NamedTuple):
    """What the chunks of a sequence have, each [C, B * G, L, *].

    total: running sums of log decays, in float64. grams: decayed q . k of the pairs. inverse: of the triangular system of
    the rule delta. write: what each row writes at its key, but for what it meets in the state before the chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    total: Tensor
    grams: Tensor
    write: Tensor
    beta: Tensor | None
    inverse: Tensor | None


def inside(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    weight_BTGE: Tensor,
    start: int,
) -> tuple[Tensor, Pairs]:
    """What tokens read of those of their own chunk that are here [C, B * G, L, V], and what it is made of.

    Chunks begin at the multiples of their size: before `start` and after the end tokens neither decay nor write.
    """
    batch, length, heads, _ = v_BTGV.shape
    exact = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    log = torch.zeros_like(v_BTGV[..., 0], dtype=exact)
    if decay is not None:
        log = decay.to(exact).expand(batch, length, heads)
    given = [q_BTHK, k_BTHK, v_BTGV, log[..., None], weight_BTGE]
    if beta_BTG is not None:
        given.append(beta_BTG[..., None])
    if start % CHUNK > 0:
        given = [F.pad(x, (0, 0, 0, 0, start % CHUNK, 0)) for x in given]
    q, k, v, g, weight, *others = (cut(x.to(exact), CHUNK, heads).flatten(1, 2) for x in given)
    # In float64, for after a decay of -1000 a float32 sum would leave the later pairs with an error of 1e-4.
    total = g.double().cumsum(-2)
    decayed = (total - total.mT).clamp(FLOOR, 0).exp().tril().to(exact)
    grams = (q @ k.mT) * decayed
    read, write, beta, inverse = grams, v, None, None
    if beta_BTG is not None:
        beta = others[0]
        system = ((beta * k) @ k.mT * decayed).tril(-1)
        unit = torch.eye(CHUNK, dtype=exact, device=q.device)
        inverse = torch.linalg.solve_triangular(
            system + unit, unit, upper=False, left=False, unitriangular=True
        )
        read = (grams @ inverse) * beta.mT
        write = inverse @ (beta * v)
    levels = _levels(q.device).clamp(max=weight.shape[3] - 1)
    shares = torch.take_along_dim(weight, levels.expand(*weight.shape[:2], -1, -1), -1)
    return (read * shares) @ v, Pairs(q, k, v, weight, total, grams, write, beta, inverse)


def joined(o: Tensor, batch: int, start: int, length: int) -> Tensor:
    """Chunks [C, B * G, L, V] as [B, T, G, V]."""
    chunks, _, rows, dim = o.shape
    first = start % CHUNK
    return (
        o.view(chunks, batch, -1, rows, dim).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, first : first + length]
    )


class Passing(NamedTuple):
    """What chunks do to the states before them: how they read them, and what they leave of them.

    A state S is read as `read` S and becomes `kept` S, under the rule delta less leaving^T (met S).
    """

    read: Tensor
    leaving: Tensor
    kept: Tensor
    met: Tensor | None


def passed(pairs: Pairs) -> Passing:
    """Of each chunk."""
    q, k, total = pairs.q, pairs.k, pairs.total
    entered = total.clamp(min=FLOOR).exp().to(q.dtype)
    leaving = k * (total[..., -1:, :] - total).clamp(min=FLOOR).exp().to(q.dtype)
    read, met = q * entered, None
    if pairs.inverse is not None and pairs.beta is not None:
        met = pairs.inverse @ (pairs.beta * k * entered)
        read = read - pairs.grams @ met
    return Passing(read, leaving, entered[..., -1:, :], met)


def opened(state_BGNKV: Tensor | None, at: int) -> dict[int, Tensor]:
    """The states [B * G, K, V] of the bits that are set in the number of a token."""
    if state_BGNKV is None:
        return {}
    return {bit: state_BGNKV[:, :, bit].flatten(0, 1) for bit in range(state_BGNKV.shape[2]) if at >> bit & 1}


def held(buckets: dict[int, Tensor], state_BGNKV: Tensor) -> Tensor:
    """The state with those of the buckets in their places."""
    for bit, bucket in buckets.items():
        state_BGNKV[:, :, bit] = bucket.view_as(state_BGNKV[:, :, bit])
    return state_BGNKV


def crossed(
    passing: Passing, chunk: int, buckets: dict[int, Tensor], weight: Tensor, at: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """What the tokens of a chunk from `at` on [B * G, L, V] read of the buckets that are open there; these after it."""
    bits = sorted(buckets)
    states = torch.cat([buckets[bit] for bit in bits], -1)
    seen = torch.unflatten(passing.read[chunk] @ states, -1, (len(bits), -1))
    share = torch.stack([_share(weight, bit, at) for bit in bits], -1)
    moved = passing.kept[chunk] * states
    if passing.met is not None:
        moved = moved - passing.leaving[chunk].mT @ (passing.met[chunk] @ states)
    after = torch.split(moved, seen.shape[-1], -1)
    return (seen * share[..., None]).sum(-2), dict(zip(bits, after, strict=True))


def _share(weight: Tensor, bit: int, at: int) -> Tensor:
    """The weights [B * G, L] that a chunk's tokens from `at` give to the bucket of a bit there."""
    last = weight.shape[2] - 1
    if bit >= CHUNK_BITS:
        return weight[..., min(bit + 1, last)]
    levels = _levels(weight.device)[:, _first(bit, at) % CHUNK].clamp(max=last)
    return torch.take_along_dim(weight, levels[None, :, None].expand(len(weight), -1, 1), 2)[..., 0]


def _first(bit: int, at: int) -> int:
    """The first token of the bucket that a bit has at a token."""
    return ((at >> bit) - 1) << bit


def left(pairs: Pairs, leaving: Tensor, end: int) -> dict[int, Tensor]:
    """What tokens of the last chunk, which ends within, have written to the buckets that are open after it."""
    found = {}
    for bit in range(CHUNK_BITS):
        if end >> bit & 1:
            first = _first(bit, end) % CHUNK
            rows = slice(first, first + (1 << bit))
            values, keys = pairs.v[-1][:, rows], leaving[:, rows]
            if pairs.inverse is not None and pairs.beta is not None:
                values, keys = pairs.inverse[-1][..., rows] @ (pairs.beta[-1][:, rows] * values), leaving
            found[bit] = keys.mT @ values
    return found


def together(
    buckets: dict[int, Tensor], at: int, written: dict[int, Tensor], later: int
) -> dict[int, Tensor]:
    """The buckets of a later token: those of `at`, and what was written meanwhile to some of the later ones."""
    found = dict(written)
    for bit, state in buckets.items():
        of = (later ^ _first(bit, at)).bit_length() - 1
        found[of] = found[of] + state if of in found else state
    return found


def _levels(device: torch.device) -> Tensor:
    """bit_length(i xor j) of a chunk's rows [L, L]."""
    rows = torch.arange(CHUNK, device=device)
    differ = rows[:, None] ^ rows
    return (differ[..., None] >= 1 << torch.arange(CHUNK_BITS, device=device)).sum(-1)


def matmul_flops(length: int, *, heads: int, key_dim: int, value_dim: int, rule: str) -> int:
    """Matmul FLOPs of the torch form's forward pass over one sequence, two for each multiply-add; padding counts."""
    chunks = -(-length // CHUNK)
    buckets = sum(number.bit_count() for number in range(chunks))
    square, state = CHUNK * CHUNK, CHUNK * key_dim * value_dim
    each = square * (key_dim + value_dim) + state
    moved = state
    if rule == "delta":
        each += square * (3 * key_dim + value_dim + CHUNK)
        moved = 3 * state
    return 2 * heads * (chunks * each + buckets * moved)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": log_linear_reference,
    "torch": log_linear_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The form of one backend. Raises ValueError where it is Triton's and Triton is not installed."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor | None]] = triton_form("log_linear", "log_linear_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("log_linear_step", "log_linear_step_triton")
        return found
    return log_linear_step
