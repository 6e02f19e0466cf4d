"""Linear recurrences with a matrix state: every decay and both rules, in one operation.

For each value head, with state S [K, V], log decay g and step size beta:

    S = e^g_t S                                     decay: none, per head, per token, or per key channel
    S = S + k_t v_t^T                               rule add
    S = S + k_t (beta_t (v_t - S^T k_t))^T          rule delta
    o_t = q_t^T S                                   (q comes scaled; nothing is scaled here)

All forms take the same arguments:

    q_BTHK, k_BTHK, v_BTGV: G value heads, a multiple of the H key heads; value head g reads key head
        g // (G / H).
    decay: None, or finite log decays of at most 0: [G], [B, T, G], or [B, T, G, K], these in [-5, 0].
    beta_BTG: None is the rule add; a tensor, with values up to 2, is the rule delta.
    state_BGKV: the state before the first token; None is zeros.
    cu_seqlens: [N+1] whole numbers from 0 to T where N sequences are packed one after the other in a batch of 1;
        states are then [N, G, K, V].

They return o_BTGV in the dtype of v and the final state_BGKV. States and everything between are float32, or
float64 where v is. They raise ValueError where a shape, dtype or device does not fit or, on a CPU, a decay leaves
its range.

Source: Katharopoulos et al. 2020 (arXiv 2006.16236, equations 18 to 20); Schlag, Irie and Schmidhuber 2021
(arXiv 2102.11174, equation 24) for the delta rule; Yang et al. 2023 (arXiv 2312.06635) for decays per
channel. `chunk_rules` and `chunk_gates` hold the chunked form's equations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.arguments import check_arguments
from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunk_gates import ChannelGates, Gates, PlainGates, ScalarGates
from mixforge.kernels.chunk_rules import ADD, DELTA, Chunks, Rule
from mixforge.kernels.operands import check_log, check_shape
from mixforge.kernels.packed import chunk_places
from mixforge.kernels.tracing import fixed

# Fifteen steps of this size from a chunk's first row to its last stay inside the range of float32.
CHANNEL_FLOOR = -5.0
# Rows of a chunk. A chunk of decays per channel is short for the same reason, and so is one where keys and values
# together have so few dims that its square matrices, of which the rule delta has more, cost more than its states.
CHUNK = 32
NARROW_CHUNK = 16
CHANNEL_CHUNK = 16
NARROW = {"add": 32, "delta": 64}
# Token-heads that are worked on at a time, so that what passes between operations stays in a core's cache.
SLAB = 4096


def chunked_linear_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other."""
    check_arguments(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens)
    if cu_seqlens is not None:
        return one_by_one(
            chunked_linear_reference, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens
        )
    check_inputs(q_BTHK, v_BTGV, decay)
    dtype = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    group = v_BTGV.shape[2] // q_BTHK.shape[2]
    # Unbound once, for the backward pass of an index would fill a tensor of the whole length at every token.
    queries = q_BTHK.to(dtype).repeat_interleave(group, 2).unbind(1)
    keys = k_BTHK.to(dtype).repeat_interleave(group, 2).unbind(1)
    values = v_BTGV.to(dtype).unbind(1)
    length = len(values)
    decays = [None] * length if decay is None else keep_steps(decay.to(dtype), length)
    betas = [None] * length if beta_BTG is None else beta_BTG.to(dtype).unbind(1)
    state = first_state(q_BTHK, v_BTGV, state_BGKV)
    outputs = []
    for q_BGK, k_BGK, v_BGV, keep, beta_BG in zip(queries, keys, values, decays, betas, strict=True):
        if keep is not None:
            state = keep * state
        write_BGV = v_BGV
        if beta_BG is not None:
            write_BGV = beta_BG[..., None] * (v_BGV - (k_BGK[..., None, :] @ state)[..., 0, :])
        state = state + k_BGK[..., :, None] * write_BGV[..., None, :]
        outputs.append((q_BGK[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1).to(v_BTGV.dtype), state


def one_by_one(
    run: Callable[..., tuple[Tensor, Tensor]],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_BGKV: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Packed sequences, each by itself."""
    outputs, states = [], []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        of_tokens = (q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG)
        cut = (x if x is None or x.dim() == 1 else x[:, start:end] for x in of_tokens)
        o_BTGV, state = run(*cut, None if state_BGKV is None else state_BGKV[number : number + 1])
        outputs.append(o_BTGV)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def keep_steps(decay: Tensor, length: int) -> list[Tensor]:
    """For each token, the factor of its state, [..., K or 1, 1]."""
    if decay.dim() == 1:
        return [decay.exp()[:, None, None]] * length
    factors = decay.exp()[..., None]
    return list((factors if decay.dim() == 4 else factors[..., None]).unbind(1))


def check_inputs(q_BTHK: Tensor, v_BTGV: Tensor, decay: Tensor | None) -> None:
    """Raise ValueError where the heads do not divide or, on a CPU, a decay per channel leaves its range."""
    if v_BTGV.shape[2] % q_BTHK.shape[2] != 0:
        raise ValueError(
            f"{v_BTGV.shape[2]} value heads are no multiple of {q_BTHK.shape[2]} key heads; "
            "give every key head the same number of value heads"
        )
    if decay is not None and decay.dim() == 4:
        check_log("decay", decay, CHANNEL_FLOOR)


def first_state(
    q_BTHK: Tensor, v_BTGV: Tensor, state_BGKV: Tensor | None, columns: int | None = None
) -> Tensor:
    """The given state or zeros, in float32 (float64 where v is), with as many columns as values have or as are said."""
    dtype = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    if state_BGKV is not None:
        return state_BGKV.to(dtype)
    batch, _, heads, value_dim = v_BTGV.shape
    return v_BTGV.new_zeros(batch, heads, q_BTHK.shape[3], columns or value_dim, dtype=dtype)


def linear_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    beta_BG: Tensor | None,
    state_BGKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (o_BGV, state_BGKV).

    `decay_now` is None, or log decays [G], [B, G] or [B, G, K], these without a lower bound.
    Where gradients are off, the state that was given is updated in place and returned. Raises ValueError where it has
    another shape.
    """
    check_shape("state", state_BGKV, (*v_BGV.shape[:2], k_BHK.shape[2], v_BGV.shape[2]), is_needed=True)
    dtype = state_BGKV.dtype
    group = v_BGV.shape[1] // q_BHK.shape[1]
    q_BGK, k_BGK = q_BHK.to(dtype), k_BHK.to(dtype)
    if group > 1:
        q_BGK, k_BGK = q_BGK.repeat_interleave(group, 1), k_BGK.repeat_interleave(group, 1)
    state, is_in_place = state_BGKV, not torch.is_grad_enabled()
    if decay_now is not None:
        keep = decay_now.to(dtype).exp()
        keep = keep[..., None] if keep.dim() == 3 else keep[..., None, None]
        state = state.mul_(keep) if is_in_place else state * keep
    write_BGV = v_BGV.to(dtype)
    if beta_BG is not None:
        read_BGV = (k_BGK[..., None, :] @ state)[..., 0, :]
        write_BGV = beta_BG.to(dtype)[..., None] * (write_BGV - read_BGV)
    add = state.addcmul_ if is_in_place else state.addcmul
    state = add(k_BGK[..., :, None], write_BGV[..., None, :])
    return (q_BGK[..., None, :] @ state)[..., 0, :].to(v_BGV.dtype), state


def chunked_linear_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks, as matrix products."""
    check_arguments(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens)
    rule = ADD if beta_BTG is None else DELTA
    gates = PlainGates if decay is None else ChannelGates if decay.dim() == 4 else ScalarGates
    if cu_seqlens is None:
        return in_chunks(rule, gates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV)
    return packed_in_chunks(rule, gates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens)


def packed_in_chunks(
    rule: Rule,
    gates: type[Gates],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_NGKV: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Packed sequences in chunks of their own, of which there are as many for any bounds, so that it is one graph."""
    _, length, heads, value_dim = v_BTGV.shape
    sequences = len(cu_seqlens) - 1
    size = chunk_size(
        -(-length // sequences),
        "add" if rule is ADD else "delta",
        q_BTHK.shape[3] + value_dim,
        is_channel=gates is ChannelGates,
    )
    place_T, edges_N1, chunks = chunk_places(cu_seqlens, length, size)
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(1, length, heads)

    def move(x: Tensor) -> Tensor:
        return x.new_zeros(1, chunks * size, *x.shape[2:]).index_copy_(1, place_T, x)

    o_BTGV, state_NGKV = in_chunks(
        rule,
        gates,
        move(q_BTHK),
        move(k_BTHK),
        move(v_BTGV),
        None if decay is None else move(decay),
        None if beta_BTG is None else move(beta_BTG),
        first_state(q_BTHK, v_BTGV, state_NGKV).expand(sequences, -1, -1, -1),
        size=size,
        edges_N1=edges_N1,
    )
    return o_BTGV.index_select(1, place_T), state_NGKV


def add_plain(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: None,
    beta_BTG: Tensor | None,
    state_BGKV: Tensor | None = None,
    is_summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule add, no decay. Values are written times beta; `is_summed` puts a column of ones beside them."""
    return in_chunks(
        ADD, PlainGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, is_summed=is_summed
    )


def add_scalar(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor,
    beta_BTG: Tensor | None,
    state_BGKV: Tensor | None = None,
    is_summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule add, a decay per head, or per token and head; the rest as in `add_plain`."""
    return in_chunks(
        ADD, ScalarGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, is_summed=is_summed
    )


def add_channel(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor,
    beta_BTG: Tensor | None,
    state_BGKV: Tensor | None = None,
    is_summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule add, a decay per key channel; the rest as in `add_plain`."""
    return in_chunks(
        ADD, ChannelGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, is_summed=is_summed
    )


def delta_plain(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: None,
    beta_BTG: Tensor,
    state_BGKV: Tensor | None = None,
    unit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule delta, no decay. With a `unit`, queries get this length and keys 1, as by `norm.unit_norm`."""
    return in_chunks(DELTA, PlainGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, unit=unit)


def delta_scalar(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor,
    beta_BTG: Tensor,
    state_BGKV: Tensor | None = None,
    unit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule delta, a decay per head, or per token and head; `unit` as in `delta_plain`."""
    return in_chunks(DELTA, ScalarGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, unit=unit)


def delta_channel(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor,
    beta_BTG: Tensor,
    state_BGKV: Tensor | None = None,
    unit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks: rule delta, a decay per key channel; `unit` as in `delta_plain`."""
    return in_chunks(DELTA, ChannelGates, q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, unit=unit)


def in_chunks(
    rule: Rule,
    gates: type[Gates],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_BGKV: Tensor | None,
    *,
    unit: float | None = None,
    is_summed: bool = False,
    size: int | None = None,
    edges_N1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a rule over the chunks, some at a time; with the `size` and `edges` of `Chunks` where sequences are packed."""
    check_inputs(q_BTHK, v_BTGV, decay)
    batch, length, heads, value_dim = v_BTGV.shape
    length = fixed(length)
    columns = value_dim + int(is_summed)
    size = size or chunk_size(
        length,
        "add" if rule is ADD else "delta",
        q_BTHK.shape[3] + columns,
        is_channel=decay is not None and decay.dim() == 4,
    )
    dtype = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    powers = None
    if decay is not None and decay.dim() == 1:
        if length % size == 0 and is_constant(decay):
            powers = constant_powers(tuple(decay.tolist()), length // size, size, dtype)
            decay = None
        else:
            decay = decay.expand(1, length, heads)
    if decay is not None:
        decay = decay if decay.dim() == 4 else decay[..., None]
    inputs = (q_BTHK, k_BTHK, v_BTGV, decay, None if beta_BTG is None else beta_BTG[..., None])
    padded = [None if x is None else pad(x.to(dtype), size, heads) for x in inputs]
    count = max(1, SLAB // (batch * heads * size))
    state = first_state(q_BTHK, v_BTGV, state_BGKV, columns)
    given = (rule, gates, size, count, unit, is_summed, powers, edges_N1)
    o, state = Chunks.apply(*padded, state, *given)  # type: ignore[no-untyped-call]
    return o[:, :length].to(v_BTGV.dtype), state


def is_constant(decay: Tensor) -> bool:
    """Whether its numbers are at hand and get no gradient."""
    is_at_hand = decay.device.type == "cpu" and not torch.compiler.is_compiling()
    # A tensor of another class may have no numbers.
    return is_at_hand and type(decay) is Tensor and not decay.requires_grad


@functools.lru_cache(maxsize=64)
def constant_powers(
    decays: tuple[float, ...], chunks: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`ScalarGates.powers` of whole chunks whose tokens all have these log decays, those of one chunk in memory."""
    # A tensor of inference mode could not be kept for an adjoint.
    with torch.inference_mode(False):
        log = torch.tensor(decays, dtype=dtype, device="cpu").view(1, 1, -1, 1, 1, 1)
        powers = ScalarGates.powers(log.expand(-1, -1, -1, -1, size, -1))
        return tuple(power.expand(chunks, -1, -1, -1, -1, *power.shape[5:]) for power in powers)


def pad(x: Tensor, size: int, heads: int) -> Tensor:
    """[B, T, H, *] padded with zeros to whole chunks, each head repeated in place.

    A padded token neither decays nor writes.
    """
    group = heads // x.shape[2]
    x = x.repeat_interleave(group, 2) if group > 1 else x
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)) if x.shape[1] % size else x


def chunk_size(length: int, rule: str, dims: int, *, is_channel: bool) -> int:
    """Rows of a chunk: a multiple of 16, no more than hold the sequence; `dims` is those of keys and of values."""
    longest = CHANNEL_CHUNK if is_channel else NARROW_CHUNK if dims <= NARROW[rule] else CHUNK
    return min(longest, -(-length // 16) * 16)


def form(backend: str, rule: str, decay: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The narrowest form that runs one rule (add, delta) and decay (none, head, scalar, channel), for a mixer.

    That of Triton runs them all, and is imported when it is asked for. That of torch has a switch where others
    have `cu_seqlens`, and takes shapes and dtypes as they come, for a mixer makes them fit; `FORMS` look at them.
    """
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("chunked_linear", "chunked_linear_triton")
        return found
    torch_forms: dict[tuple[str, str], Callable[..., tuple[Tensor, Tensor]]] = {
        ("add", "none"): add_plain,
        ("add", "head"): add_scalar,
        ("add", "scalar"): add_scalar,
        ("add", "channel"): add_channel,
        ("delta", "none"): delta_plain,
        ("delta", "head"): delta_scalar,
        ("delta", "scalar"): delta_scalar,
        ("delta", "channel"): delta_channel,
    }
    narrow = {"reference": chunked_linear_reference, "torch": torch_forms[rule, decay]}
    return narrow[backend]


def matmul_flops(
    length: int, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, rule: str, decay: str
) -> int:
    """Matmul FLOPs of the torch form's forward pass over one sequence, two for each multiply-add.

    Padding counts, and so do the zeros above a diagonal: it is what runs. Key heads are repeated, so their
    number does not matter; the triangular system is not a product.
    """
    size = chunk_size(length, rule, key_dim + value_dim, is_channel=decay == "channel")
    chunks = -(-length // size)
    pairs, states = (1, 2) if rule == "add" else (2, 3)
    products = pairs * size * size * (key_dim + value_dim) + states * size * key_dim * value_dim
    return 2 * chunks * value_heads * products


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("chunked_linear_step", "linear_step_triton")
        return found
    return linear_step


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": chunked_linear_reference,
    "torch": chunked_linear_torch,
}
