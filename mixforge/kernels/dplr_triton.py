"""Linear recurrences of a decay and a rank-one removal in Triton, with decays of the values beside: one template.

For each head, with state S [K, V], log decays g [K] of its rows and h [V] of its columns, removal key a and strength b:

    S_t = (Diag(e^g_t) - b_t a_t^T) S_{t-1} Diag(e^h_t) + k_t v_t^T        o_t = q_t^T S_t

Removal, g and h may each be left out: `dplr` has the first two, `twofold_linear` the last two. In a chunk of 16 rows
that starts from S0, with G the running sum of g and F its first row, G~ = G - g, L the last row, the same of h as H:

    dplr_pairs    P = (q e^(G - F)) (k e^(F - G))^T, and R, A and E of (q, b), (a, b) and (a, k), those of a with G~;
                  M = (I + A)^-1, N = M E, W = M (a e^G~); q e^G, k e^(L - G) and b e^(L - G)
    dplr_scan     u = e^(H - F) (W S0 e^F + N v e^(F - H))
                  o = e^(H - F) (q e^G S0 e^F + P v e^(F - H) - R u e^(F - H))
                  S1 = e^L (S0 e^L) + (k e^(L - G))^T v e^(L - H) - (b e^(L - G))^T u e^(L - H)

and backwards, from do and the gradient of the last state:

    dplr_scan_backward     du = -e^(L - H) b e^(L - G) dS1 - e^(F - H) R^T do e^(H - F)
                           dv = e^(L - H) k e^(L - G) dS1 + e^(F - H) (P^T do e^(H - F) + N^T du e^(H - F))
                           dS0 = e^L (dS1 e^L) + (q e^G)^T do e^H + W^T du e^H
    dplr_pairs_backward    the gradients of P, R, N, W and the three scaled keys, from S0, dS1, do, du, v and u
    dplr_gradients         dq, dk, da, db and dg

u is what each row reads of the state, where it is removed: values and u go through the same three places. The first row
of a chunk is the anchor of all powers: nothing of a later row enters an earlier one, and with log decays of at least -5
no power passes e^75. M is made by substitution. States and sums are float32; operands of products have the dtype of v.

The states before every fourth chunk are kept for backward, which remakes those in between: K V / 64 numbers a token, as
in `chunked_linear`. All of them would be four times as many, more than all else that is kept of heads of 128 channels.
Backward only the gradient of the state goes from chunk to chunk, and is stored after each of them; all else is made of
each chunk by itself. No product takes a sum of products transposed, for compilers have made wrong code of that.

Source: Peng et al. 2025 (arXiv 2503.14456), section 4 and appendix; Yang et al. 2023 (arXiv 2312.06635), section 4, for
chunks with decays. Departures: one template with decays of the values, which the removal reads after; the gradient is
from the equations above.
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.chunked_linear_triton import TYPES, check_limits, padded
from mixforge.kernels.dplr import check_dplr
from mixforge.kernels.dplr_backward_triton import dplr_gradients, dplr_pairs_backward, dplr_scan_backward
from mixforge.kernels.dplr_forward_triton import dplr_pairs, dplr_scan
from mixforge.kernels.launch import check_runs, dot_precision, generation, launch, on_device, recording
from mixforge.kernels.twofold_linear import check_twofold

CHUNK = 16
GROUP = 4
"""Chunks from one kept state to the next."""


class Shape:
    """What every launch of one call has in common."""

    def __init__(
        self, q: Tensor, v: Tensor, decay: Tensor | None, value_decay: Tensor | None, removal: Tensor | None
    ) -> None:
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values, self.dtype = v.shape[3], v.dtype
        self.chunks = -(-self.length // CHUNK)
        self.groups = -(-self.chunks // GROUP)
        self.has_key, self.has_value, self.removes = (x is not None for x in (decay, value_decay, removal))
        precision = self.wide_precision = dot_precision(v.dtype)
        self.wide = v.dtype
        # Powers up to e^75 are beyond float16; its mantissa is that of TF32.
        if v.dtype == torch.float16 and (self.has_key or self.has_value):
            self.wide, self.wide_precision = torch.float32, self.solve_precision
        self.of_keys = {
            "H": self.heads, "K": self.keys, "KEY": self.has_key, "REMOVE": self.removes,
            "C": CHUNK, "WIDE": TYPES[self.wide],
        }  # fmt: skip
        self.of_values = {
            "V": self.values, "VALUE": self.has_value,
            "WIDE_PRECISION": self.wide_precision, "PRECISION": precision,
        }  # fmt: skip

    @property
    def solve_precision(self) -> str:
        """Of products of float32 around the system, which has no more digits than what it is made of."""
        if self.dtype == torch.float32:
            return dot_precision(torch.float32)
        return "tf32" if generation().startswith("sm_") else "ieee"

    def run_chunks(self, kernel: Any, *args: Any) -> None:
        """One program for each chunk and head, without its values."""
        launch(
            kernel, (self.batch * self.heads * self.chunks,), *args, self.length, self.chunks,
            config=self.config(kernel), **self.of_keys, PRECISION=self.wide_precision, SOLVE=self.solve_precision,
        )  # fmt: skip

    def run_values(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """One program for each chunk and head."""
        launch(
            kernel, (self.batch * self.heads * self.chunks,), *args, self.length, self.chunks,
            config=self.config(kernel), **self.of_keys, **self.of_values, **constants,
        )  # fmt: skip

    def run_scan(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """One program for each head and block of value channels."""
        config = self.config(kernel)
        launch(
            kernel, (self.batch * self.heads, -(-self.values // config.blocks["BV"])), *args, self.length, self.chunks,
            config=config, **self.of_keys, **self.of_values, KP=padded(self.keys), **constants,
        )  # fmt: skip

    def config(self, kernel: Any) -> Config:
        """Its blocks are no wider than what there is."""
        variant = "value decays" if self.has_value else ""
        found = choose(kernel.fn.__name__, generation(), self.dtype, self.keys, self.values, variant)
        most = {"BK": padded(self.keys), "BV": padded(self.values)}
        return replace(found, blocks={name: min(size, most[name]) for name, size in found.blocks.items()})


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """o, the last state, and what backward needs: q, k, W and b as `dplr_pairs` scales them, e^L, P, R, N, M, u and the
    states before the groups.

    What has none is empty.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, value_decay, removal, state = (
        None if x is None else x.contiguous() for x in (decay, value_decay, removal, state)
    )
    shape = Shape(q, v, decay, value_decay, removal)
    cells = (shape.batch, shape.length, shape.heads)
    per_head = (shape.batch * shape.heads,)
    removes = shape.removes
    q_read, k_write = (torch.empty_like(q) if shape.has_key else None for _ in range(2))
    a_read, b_write = (torch.empty_like(q) if removes else None for _ in range(2))
    keep = q.new_empty(*per_head, shape.chunks, shape.keys, dtype=torch.float32) if shape.has_key else None
    pairs = q.new_empty(*cells, CHUNK)
    removed, solved, inverse = (torch.empty_like(pairs) if removes else None for _ in range(3))
    made = (q_read, k_write, a_read, b_write, keep, pairs, removed, solved)
    shape.run_chunks(dplr_pairs, q, k, removal, decay, *made, inverse)
    u = torch.empty_like(v) if removes else None
    states = q.new_empty(*per_head, shape.groups, shape.values, shape.keys)
    final = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    o = torch.empty_like(v)
    scaled = (q, k) if q_read is None else (q_read, k_write)
    shape.run_scan(dplr_scan, *scaled, *made[2:], v, value_decay, u, states, state, final, o, GROUP=GROUP)
    # An operation of torch returns tensors: what there is not is empty.
    return o, final, *(_or_empty(q, x) for x in (*made, inverse, u, states))  # type: ignore[return-value]


def backward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    q_read: Tensor,
    k_write: Tensor,
    a_read: Tensor,
    b_write: Tensor,
    keep: Tensor,
    pairs: Tensor,
    removed: Tensor,
    solved: Tensor,
    inverse: Tensor,
    u: Tensor,
    states: Tensor,
    o: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the decays, what is removed and the first state, from those of o and the last state.

    What has none is empty.
    """
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    decay, value_decay, removal, dfinal = (
        None if x is None else x.contiguous() for x in (decay, value_decay, removal, dfinal)
    )
    shape = Shape(q, v, decay, value_decay, removal)
    scaled = (q_read, k_write) if shape.has_key else (q, k)
    w, b, dropped, n, m, kept_u = (
        x if shape.removes else None for x in (a_read, b_write, removed, solved, inverse, u)
    )
    kept_keep = keep if shape.has_key else None
    dv = torch.empty_like(v)
    du = torch.empty_like(v) if shape.removes else None
    dvalue_decay = None if value_decay is None else torch.empty_like(value_decay)
    dstate = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    dstates = q.new_empty(shape.batch * shape.heads, shape.chunks, shape.values, shape.keys)
    shape.run_scan(
        dplr_scan_backward, *scaled, w, b, kept_keep, pairs, dropped, n, v, value_decay, kept_u,
        o if shape.has_value else None, do, dfinal, dstates, du, dv, dvalue_decay, dstate,
    )  # fmt: skip
    dq_read, dk_write = (torch.empty_like(q) for _ in range(2))
    da_read, db_write = (torch.empty_like(q) if shape.removes else None for _ in range(2))
    dkeep = torch.empty_like(keep) if shape.has_key else None
    dpairs = torch.empty_like(pairs, dtype=shape.wide)
    dremoved, dsolved = (torch.empty_like(dpairs) if shape.removes else None for _ in range(2))
    made = (dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved)
    shape.run_values(
        dplr_pairs_backward, scaled[1], b, kept_keep, v, value_decay, kept_u, states, do, dstates, du, *made,
        dvalue_decay, GROUP=GROUP,
    )  # fmt: skip
    del dstates, du
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dremoval = None if removal is None else torch.empty_like(removal)
    ddecay = None if decay is None else torch.empty_like(decay)
    shape.run_chunks(
        dplr_gradients, q, k, removal, decay, kept_keep, w, n, m, *made, dq, dk, dremoval, ddecay
    )
    return dq, dk, dv, *(_or_empty(q, x) for x in (ddecay, dvalue_decay, dremoval)), dstate  # type: ignore[return-value]


def _or_empty(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x


forward = torch.library.custom_op("mixforge::dplr_forward", on_device(forward_kernels), mutates_args=())
backward = torch.library.custom_op("mixforge::dplr_backward", on_device(backward_kernels), mutates_args=())


@forward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return forward_kernels(*args)


@backward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return backward_kernels(*args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    has_values = inputs[4] is not None
    # Only decays of values need the outputs.
    o = output[0] if has_values else output[0].new_empty(0)
    ctx.save_for_backward(*inputs[:6], *output[2:], o)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dfinal = grads[:2]
    given = ctx.saved_tensors[:6]
    do = torch.zeros_like(given[2]) if do is None else do
    found = backward(*ctx.saved_tensors, do, dfinal)
    of_inputs = (None if x is None else grad for x, grad in zip(given, found[:6], strict=True))
    return *of_inputs, found[6] if ctx.needs_input_grad[6] else None


forward.register_autograd(_gradients, setup_context=_keep)


def dplr_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor | None,
    removal_BTHRK: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `dplr.dplr_reference`, on a GPU; the state is float32. Raises ValueError where a shape, dtype or device does
    not fit."""
    check_dplr(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, removal_BTHRK, state_BHKV)
    return _run(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, None, removal_BTHRK, state_BHKV)


def twofold_linear_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    value_decay_BTHV: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `twofold_linear.twofold_linear_reference`, on a GPU; the state is float32. Raises ValueError where a shape,
    dtype or device does not fit."""
    check_twofold(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV, state_BHKV)
    return _run(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV, None, state_BHKV)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_runs("q", q)
    check_limits(q)
    decay, value_decay, state = (None if x is None else x.float() for x in (decay, value_decay, state))
    o, last, *_ = forward(q, k, v, decay, value_decay, removal, state)
    return o, last
