"""The linear family in Triton: stages that every decay and both rules share.

A sequence is cut into chunks of 64 rows. For each chunk and value head, with G the running sum of its log decays,
gram, reading, writing and keep as in `chunk_gates`, and S0 the state before the chunk:

    linear_gram      P = gram(Q, K), A = beta gram(K, K) below the diagonal; G    rule delta, or decays per channel
    linear_solve     M = (I + A)^-1                                                           rule delta
    linear_scan      U = M beta (V - reading(K) S0), or V under rule add; S1 = keep(S0) + writing(K)^T U
    linear_output    O = reading(Q) S0 + P U; P, where no stage before has made it

Where it has programs enough to fill a device, `linear_scan` makes O as well, and P under rule add: U and the states, that
`linear_output` would read, are then written for backward alone, and not at all without gradients. Where keys are narrow,
`linear_gram_solve` is the first two stages in one. Backwards, from dO and the gradient of the last state:

    linear_scan_backward     dU = P^T dO + writing(K) dS1;  dX = M^T dU (dU under rule add);
                             dS0 = keep(dS1) + reading(Q)^T dO - reading(K)^T (beta dX)
    linear_pairs_backward    dP = dO U^T, dA = -dX U^T
    linear_gradients         dQ, dK, dV, dG and dbeta of a block of key channels; of narrow keys under rule add dP too

The rule decides how U is made, the decay decides gram and three scalings: a new combination needs no new kernel.
For backward P, M, U and the states between the chunks are kept; W = M beta reading(K) of the papers is never formed.

Decays of a token and head enter as differences that are masked before the exponential. Decays of a channel are
products of two powers that start from the sum in the first row of a block of 16, never behind the later of the two
rows: nothing of a later row enters an earlier one, and with log decays of at least -5 no power passes e^75. M comes
from substitution in the blocks of 16 rows on the diagonal, merged by products of blocks: a Neumann series fails for
keys that resemble one another. States and sums are float32; operands of products have the dtype of v. Log decays
below -30 count as -30: e^-30 is nothing beside the rounding of float32, and sums stay small enough to be differenced.

Source: Yang et al. 2023 (arXiv 2312.06635, section 4) for chunks with decays; Yang et al. 2024 (arXiv 2406.06484,
section 3.2) and Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464, section 3.3) for the delta rule. Departures: U is
made from M in the scan; the gradient is from the equations above, which need neither W nor its gradient.
"""

# Launches of jit functions have no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from mixforge.kernels.arguments import check_arguments
from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import ANY, Config, ShapeClass, choose, rows_for
from mixforge.kernels.chunked_linear import check_inputs
from mixforge.kernels.chunked_linear_backward_triton import (
    linear_gradients,
    linear_pairs_backward,
    linear_scan_backward,
)
from mixforge.kernels.chunked_linear_forward_triton import (
    linear_gram,
    linear_gram_solve,
    linear_output,
    linear_scan,
    linear_solve,
)
from mixforge.kernels.chunked_linear_wide_triton import linear_scan_backward_wide, linear_scan_wide
from mixforge.kernels.launch import check_device, dot_precision, generation, launch, on_device, recording
from mixforge.kernels.operands import wants_gradient

CHUNK = 64
BLOCK = 16
GATES = {"none": 0, "head": 1, "scalar": 2, "channel": 3}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Of one scan whose state stays in registers: float32 keys wider than 128 are beyond the shared memory of every device.
MOST_KEYS = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# Programs, each of one head and 64 of the values, with which a scan fills a device: about its multiprocessors.
ENOUGH = 128
# Of a group, where there are more and the rule is add.
GROUP = 128


SCANS = (linear_scan, linear_scan_wide, linear_scan_backward, linear_scan_backward_wide)


def chunked_linear_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked_linear_reference`, on a GPU; the state is float32.

    cu_seqlens: [N+1] whole numbers from 0 to T, for N sequences packed one after the other in a batch of 1; states are
    then [N, G, K, V]. Raises ValueError where a shape, dtype or device does not fit.
    """
    check_arguments(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens)
    check_inputs(q_BTHK, v_BTGV, decay)
    check_limits(q_BTHK, ANY)
    if q_BTHK.shape[3] > MOST_KEYS[q_BTHK.dtype] and beta_BTG is None:
        return by_groups_of_keys(q_BTHK, k_BTHK, v_BTGV, decay, state_BGKV, cu_seqlens)
    given = (q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV)
    keeps = wants_gradient(*given)
    o_BTGV, state, *_ = forward(*given, cu_seqlens, keeps)
    return o_BTGV, state


def by_groups_of_keys(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    state_BGKV: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule add over more key channels than the kernels take: it is a sum over groups of them, each a head."""
    batch, length, key_heads, keys = q_BTHK.shape
    heads, values = v_BTGV.shape[2:]
    count = -(-keys // GROUP)
    size, shared = -(-keys // count), heads // key_heads
    parts = (key_heads, count, shared)

    def cut(x: Tensor, dim: int) -> Tensor:
        return torch.unflatten(F.pad(x.movedim(dim, -1), (0, count * size - keys)), -1, (count, size))

    def repeated(x: Tensor, dim: int) -> Tensor:
        """Of value heads, for every group."""
        grouped = torch.unflatten(x, dim, (key_heads, 1, shared))
        shape = (*grouped.shape[: dim + 1], count, *grouped.shape[dim + 2 :])
        return grouped.expand(shape).flatten(dim, dim + 2)

    q, k = (cut(x, 3).flatten(2, 3) for x in (q_BTHK, k_BTHK))
    if decay is not None and decay.dim() == 4:
        decay = cut(decay, 3).unflatten(2, (key_heads, shared)).movedim(4, 3).flatten(2, 4)
    elif decay is not None:
        decay = repeated(decay, decay.dim() - 1)
    state = None
    if state_BGKV is not None:
        state = cut(state_BGKV, 2).unflatten(1, (key_heads, shared)).permute(0, 1, 4, 2, 5, 3).flatten(1, 3)
    o, last = chunked_linear_triton(q, k, repeated(v_BTGV, 2), decay, None, state, cu_seqlens)
    o_BTGV = o.view(batch, length, *parts, values).sum(3, dtype=torch.float32).flatten(2, 3).to(v_BTGV.dtype)
    last = last.unflatten(1, parts).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return o_BTGV, last[:, :, :keys].contiguous()


def check_limits(q: Tensor, most: int | None = None) -> None:
    """Raise ValueError for a dtype that the kernels do not take, BeyondKernels for more key channels than `most`.

    None is what one scan takes whose state stays in registers.
    """
    if q.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ValueError(f"q is {q.dtype}; backend='triton' takes {known}")
    most = MOST_KEYS[q.dtype] if most is None else most
    if q.shape[3] > most:
        name = str(q.dtype).removeprefix("torch.")
        raise BeyondKernels(
            f"q has {q.shape[3]} key channels; backend='triton' takes at most {most} in {name}: give a smaller key_dim, "
            "or build with backend='torch'"
        )


def gate_of(decay: Tensor | None) -> str:
    """The kind of a decay by its shape."""
    return "none" if decay is None else {1: "head", 3: "scalar", 4: "channel"}[decay.dim()]


def is_hopper_half(dtype: torch.dtype) -> bool:
    """Whether products of half precision are launched for Hopper, whose warps multiply in groups of four."""
    return generation().startswith("sm_9") and dtype.itemsize == 2


class Shape:
    """What every launch of one call has in common."""

    def __init__(
        self, q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, cu: Tensor | None
    ) -> None:
        self.batch, self.length, self.key_heads, self.keys = q.shape
        self.heads, self.values = v.shape[2:]
        self.gate, self.delta = gate_of(decay), beta is not None
        # Whether a stage of its own makes P: without a system or powers the output does.
        self.has_gram = self.delta or self.gate == "channel"
        # Whether the running sums are stored: those of a fixed decay are not.
        self.sums = self.gate in ("scalar", "channel")
        # Queries and keys that a decay per channel has scaled are those of value heads.
        self.read_heads = self.heads if self.gate == "channel" else self.key_heads
        self._configs: dict[str, Config] = {}
        self.cu = cu
        self.table = self.offsets = None
        self.sequences = self.batch
        self.chunks = -(-self.length // CHUNK)
        if cu is not None:
            self.sequences = len(cu) - 1
            # As many as there can be; those that are not needed belong to sequence -1.
            self.chunks += self.sequences - 1
            counts = (cu.diff() + CHUNK - 1) // CHUNK
            self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            number = torch.arange(self.chunks, device=cu.device)
            owner = torch.searchsorted(self.offsets, number, right=True) - 1
            unused = owner >= self.sequences
            inner = number - self.offsets[owner.clamp(max=self.sequences - 1)]
            self.table = torch.stack(
                [owner.masked_fill(unused, -1), inner.masked_fill(unused, 0)], 1
            ).contiguous()
        self.dtype = v.dtype
        self.is_wide = self.delta and self.keys > MOST_KEYS[v.dtype]
        # Whether the scan makes O as well, so that no other kernel reads states and values again: where the table has
        # blocks for it, and there are programs enough, since each of them goes from chunk to chunk.
        programs = self.sequences * self.heads * -(-self.values // 64)
        fills = programs >= ENOUGH and not self.is_wide
        self.fuses = fills and self._has_blocks("linear_scan", "output")
        # Whether P, A and M are made by one kernel: for narrow keys, whose products are work for a single warp.
        self.is_narrow = self.delta and self.gate != "channel" and self._has_blocks("linear_gram_solve")
        # Whether dP stays within linear_gradients: where one block of keys is all of them.
        self.joins = not self.delta and self._has_blocks("linear_gradients", "pairs")
        # The scan goes on from what it stored.
        self.of_states = torch.float32 if self.is_wide else v.dtype
        # Powers up to e^75 are beyond float16; its mantissa is that of TF32.
        self.wide, self.wide_precision = v.dtype, dot_precision(v.dtype)
        if v.dtype == torch.float16 and self.gate == "channel":
            self.wide = torch.float32
            self.wide_precision = "tf32" if generation().startswith("sm_") else "ieee"

    def _has_blocks(self, kernel: str, *more: str) -> bool:
        """Whether the table has blocks of a kernel that makes a part more than its own."""
        variant = ", ".join((*more, self.variant))
        wanted = ShapeClass(kernel, self.dtype, self.keys, self.values, variant)
        return any(row.variant.startswith("".join(more)) for row in rows_for(wanted, generation()))

    @property
    def variant(self) -> str:
        """Decay and rule."""
        return f"{self.gate}, {'delta' if self.delta else 'add'}"

    def config(self, kernel: Any, used: tuple[str, ...]) -> Config:
        """Blocks of a kernel, no wider than the dims are."""
        name = kernel.fn.__name__
        if name not in self._configs:
            self._configs[name] = self._config(name, used)
        return self._configs[name]

    def _config(self, name: str, used: tuple[str, ...]) -> Config:
        more = {"linear_scan": "output, " * self.fuses, "linear_gradients": "pairs, " * self.joins}
        variant = more.get(name, "") + self.variant
        # Of decays per channel, linear_gram multiplies what their powers have scaled.
        dtype = self.wide if name == "linear_gram" else self.dtype
        found = choose(name, generation(), dtype, self.keys, self.values, variant)
        dims = {"BK": self.keys, "BV": self.values}
        if (
            name == "linear_gradients"
            and self.gate != "channel"
            and self.values > 32
            and is_hopper_half(self.dtype)
        ):
            # Of 32 key channels beside wider values, Triton 3.6 makes wrong products there.
            dims["BK"] = max(dims["BK"], 64)
        blocks = {name: min(found.blocks[name], padded(dims[name])) for name in used}
        return replace(found, blocks=blocks)

    def scan(self, held: Any, wide: Any) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
        """The kernel of a scan, its blocks, and what it is told beside: `wide` where keys are."""
        if self.is_wide:
            return wide, ("BK", "BV"), {}
        return held, ("BV",), {"DELTA": self.delta, "KP": padded(self.keys)}

    def of_scan(self, kernel: Any, blocks: tuple[str, ...]) -> tuple[int, int]:
        """Its grid."""
        return self.sequences * self.heads, -(-self.values // self.config(kernel, blocks).blocks["BV"])

    @property
    def constants(self) -> dict[str, Any]:
        return {"G": self.heads, "VARLEN": self.cu is not None, "C": CHUNK}

    def run(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, blocks: tuple[str, ...] = (), **constants: Any
    ) -> None:
        """Launch a kernel that takes the sequences' bounds and the lengths at its end."""
        is_scan = kernel in SCANS
        places = (self.cu, self.offsets if is_scan else self.table)
        rows = (self.batch * self.length,) if kernel is linear_gradients else ()
        ends = (self.length, self.chunks)
        config = self.config(kernel, blocks)
        launch(kernel, grid, *args, *places, *rows, *ends, config=config, **self.constants, **constants)


def padded(size: int) -> int:
    """The next power of two that a product of matrices can have."""
    return max(16, 1 << (size - 1).bit_length())


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what backward needs: sums, scaled q and k, P, M, U and the states before the chunks.

    What a rule or decay does not have is empty, and all of it where it is not to be kept.
    """
    check_device(q=q, k=k, v=v, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, beta, state = (None if x is None else x.contiguous() for x in (decay, beta, state))
    shape = Shape(q, v, decay, beta, cu_seqlens)
    common: dict[str, Any] = {"K": shape.keys, "GATE": GATES[shape.gate]}
    value, precision = {"V": shape.values}, dot_precision(shape.dtype)
    cells = (shape.batch, shape.length, shape.heads)
    scaled = [q.new_empty(*cells, shape.keys) for _ in range(3)] if shape.gate == "channel" else []
    # What a later kernel reads.
    has_later = keeps or not shape.fuses
    has_sums = shape.sums and (has_later or shape.has_gram)
    sums = q.new_empty(decay.shape, dtype=torch.float32) if has_sums and decay is not None else None
    pairs = q.new_empty(*cells, CHUNK) if keeps or shape.has_gram else None
    system = q.new_empty(*cells, CHUNK, dtype=torch.float32) if shape.delta else None
    inverse = q.new_empty(*cells, CHUNK) if shape.delta else None
    u = torch.empty_like(v) if shape.delta and has_later else None
    states = None
    if has_later:
        of_states = (shape.chunks * shape.batch, shape.heads, shape.keys, shape.values)
        states = q.new_empty(of_states, dtype=shape.of_states)
    final = q.new_empty(shape.sequences, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    o = torch.empty_like(v)
    each_chunk = (shape.batch * shape.heads, shape.chunks)
    solve = dot_precision(torch.float32)
    if shape.is_narrow:
        shape.run(
            linear_gram_solve, each_chunk, q, k, decay, beta, sums, pairs, system, inverse,
            **common, H=shape.key_heads, SUB=BLOCK, KP=padded(shape.keys), PRECISION=precision, SOLVE=solve,
        )  # fmt: skip
    elif shape.has_gram:
        shape.run(
            linear_gram, each_chunk, q, k, decay, beta, sums, *(scaled or (None, None, None)), pairs, system,
            blocks=("BK",), **common, H=shape.key_heads, DELTA=shape.delta, SUB=BLOCK, WIDE=TYPES[shape.wide],
            PRECISION=shape.wide_precision,
        )  # fmt: skip
    if shape.delta and not shape.is_narrow:
        shape.run(linear_solve, each_chunk, system, inverse, SUB=BLOCK, PRECISION=solve)
    q_read, k_read, k_write = scaled or (q, k, k)
    kernel, blocks, how = shape.scan(linear_scan, linear_scan_wide)
    output = () if shape.is_wide else (q_read, pairs, o) if shape.fuses else (None, None, None)
    shape.run(
        kernel, shape.of_scan(kernel, blocks), *output,
        k_read, k_write, v, decay, beta, sums, inverse, u, states, state, final, blocks=blocks,
        **common, **value, **how, H=shape.read_heads, PRECISION=precision,
    )  # fmt: skip
    if not shape.fuses:
        wide = shape.config(linear_output, ("BK", "BV")).blocks["BV"]
        shape.run(
            linear_output, (*each_chunk, -(-shape.values // wide)),
            q_read, k, decay, sums, pairs, v if u is None else u, states, o, blocks=("BK", "BV"),
            **common, **value, H=shape.read_heads, GRAM=not shape.has_gram, PRECISION=precision,
        )  # fmt: skip
    kept = (sums, *(scaled or (None, None, None)), pairs, inverse, u, states) if keeps else (None,) * 8
    # An operation of torch returns tensors: what there is not is empty.
    return o, final, *(_or_empty(q, x) for x in kept)  # type: ignore[return-value]


def backward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    q_read: Tensor,
    k_read: Tensor,
    k_write: Tensor,
    pairs: Tensor,
    inverse: Tensor,
    u: Tensor,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    of_decay: bool = True,
    of_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay, beta and the first state, from those of o and the last state.

    What has none is empty; those of the decay and the first state also where they are not wanted, as of constants.
    """
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    decay, beta, dfinal = (None if x is None else x.contiguous() for x in (decay, beta, dfinal))
    shape = Shape(q, v, decay, beta, cu_seqlens)
    common = {"K": shape.keys, "GATE": GATES[shape.gate]}
    value, precision = {"V": shape.values}, dot_precision(shape.dtype)
    kept_sums = sums if shape.sums else None
    scaled = (q_read, k_read, k_write) if shape.gate == "channel" else (q, k, k)
    kept_u = u if shape.delta else v
    cells = (shape.batch, shape.length, shape.heads)
    dx, dstates = torch.empty_like(v), torch.empty_like(states)
    dfirst = None
    if of_state or shape.is_wide:
        # That of a wide scan is also its room to work in.
        dfirst = q.new_empty(shape.sequences, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    kernel, blocks, how = shape.scan(linear_scan_backward, linear_scan_backward_wide)
    shape.run(
        kernel, shape.of_scan(kernel, blocks),
        *scaled, decay, beta, kept_sums, pairs, inverse if shape.delta else None, do, dx, dstates, dfinal, dfirst,
        blocks=blocks, **common, **value, **how, H=shape.read_heads, PRECISION=precision,
    )  # fmt: skip
    dpairs = None if shape.joins else q.new_empty(*cells, CHUNK, dtype=shape.wide)
    dsystem = None if dpairs is None or not shape.delta else torch.empty_like(dpairs)
    each_chunk = (shape.batch * shape.heads, shape.chunks)
    wide = shape.config(linear_gradients, ("BK", "BV")).blocks["BK"]
    parts = -(-shape.keys // wide)
    dbeta = q.new_empty(1 + parts if parts > 1 else 1, *cells, dtype=torch.float32) if shape.delta else None
    dv = torch.empty_like(v) if shape.delta else dx
    if not shape.joins:
        shape.run(
            linear_pairs_backward, each_chunk,
            v if shape.delta else None, decay, beta, kept_sums, kept_u, do,
            dx if shape.delta else None, dv if shape.delta else None, dbeta, dpairs, dsystem,
            blocks=("BV",), GATE=common["GATE"], DELTA=shape.delta, **value, PRECISION=precision,
        )  # fmt: skip
    # Value heads that share a key head add their gradients, in float32.
    is_shared = shape.heads > shape.key_heads
    dq = q.new_empty(*cells, shape.keys, dtype=torch.float32 if is_shared else q.dtype)
    dk = torch.empty_like(dq)
    dlog = None
    if shape.gate != "none" and of_decay:
        of_log = {
            "head": (parts, shape.chunks, shape.batch, shape.heads),
            "scalar": (parts, *cells),
            "channel": (*cells, shape.keys),
        }
        dlog = q.new_empty(of_log[shape.gate], dtype=torch.float32)
    shape.run(
        linear_gradients, (*each_chunk, parts),
        q, k, decay, beta, kept_sums, kept_u, states, do, dx if shape.delta else None, dstates, dpairs, dsystem,
        dq, dk, dlog, dbeta,
        blocks=("BK", "BV"), **common, **value, H=shape.key_heads, DELTA=shape.delta,
        SUB=BLOCK, WIDE=TYPES[shape.wide], PRECISION=shape.wide_precision,
    )  # fmt: skip
    if is_shared:
        group = (shape.batch, shape.length, shape.key_heads, shape.heads // shape.key_heads, shape.keys)
        dq, dk = (x.view(group).sum(3).to(q.dtype) for x in (dq, dk))
    if dlog is not None and shape.gate == "head":
        dlog = dlog.sum((0, 1, 2))
    if dlog is not None and shape.gate == "scalar":
        dlog = dlog[0] if parts == 1 else dlog.sum(0)
    dbeta = None if dbeta is None else dbeta[0] if parts == 1 else dbeta.sum(0)
    dfirst = dfirst if of_state else None
    return dq, dk, dv, _or_empty(q, dlog), _or_empty(q, dbeta), _or_empty(q, dfirst)


def _or_empty(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x


forward = torch.library.custom_op(
    "mixforge::chunked_linear_forward", on_device(forward_kernels), mutates_args=()
)
backward = torch.library.custom_op(
    "mixforge::chunked_linear_backward", on_device(backward_kernels), mutates_args=()
)


@forward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return forward_kernels(*args)


@backward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return backward_kernels(*args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, decay, beta, _, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, decay, beta, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dfinal = grads[:2]
    v, beta = ctx.saved_tensors[2], ctx.saved_tensors[4]
    do = torch.zeros_like(v) if do is None else do
    of_decay, of_state = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    dq, dk, dv, dlog, dbeta, dfirst = backward(*ctx.saved_tensors, do, dfinal, of_decay, of_state)
    # Those of the decay, the step size and the state are float32, whatever these are: autograd casts them.
    return (
        dq, dk, dv, dlog if of_decay else None, None if beta is None else dbeta,
        dfirst if of_state else None, None, None,
    )  # fmt: skip


forward.register_autograd(_gradients, setup_context=_keep)
