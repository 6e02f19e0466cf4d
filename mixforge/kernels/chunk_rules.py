"""The rules add and delta over all chunks of a sequence, each with its adjoint.

In a chunk that starts from the state S0, with the products of `chunk_gates`:

    Y = V, W = K                                                                rule add
    (I + A) Y = V - reading(K) S0,  W = beta K,  A_ij = gram(K, W)_ij for i > j         rule delta
    O = reading(Q) S0 + gram(Q, W) Y
    S1 = keep(S0) + writing(W)^T Y

The triangular system is solved by substitution: a Neumann series or repeated squaring fails for keys that
resemble one another. The adjoint runs over the chunks backwards, from the states between them; it keeps
those, Y and the products of rows, and makes the scalings again.

Source: Yang et al. 2024 (arXiv 2406.06484, section 3.2) and Yang, Kautz and Hatamizadeh 2024
(arXiv 2412.06464, section 3.3). Departures: Y comes chunk by chunk, the matrix W of those papers is
never formed; the step size scales the keys that are written, not what is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.chunk_gates import Gates

# The adjoints' arguments without a gradient come back as None.
Gradients = tuple[Tensor | None, ...]


class Rule(ABC):
    """One rule over the chunks of a slab, and its adjoint. Tensors are [C, B, G, L, *], views of any strides."""

    @staticmethod
    @abstractmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """o, the state after the last chunk, [B, G, K, V], and what `backward` needs."""

    @staticmethod
    @abstractmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        do: Tensor,
        dstate: Tensor,
        decays: bool,
    ) -> Gradients:
        """Gradients of q, k, v, log decays where `decays`, beta and the state."""


class AddRule(Rule):
    """Rule add."""

    @staticmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, w, y = gates.rows(q, space(q)), gates.columns(k, space(k)), v.contiguous()
        inner = gates.mask_(q @ w.mT)
        states = state.new_empty(len(q) + 1, *state.shape)
        states[0] = gates.enter(state)
        torch.matmul(gates.writing(w, w).mT, y, out=states[1:])
        for chunk in range(len(q)):
            add_kept(gates.keep(chunk), states[chunk], states[chunk + 1])
        o = add_products(gates.reading(q, q) @ states[:-1], inner, y)
        return o, states[-1], (inner, states)

    @staticmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        do: Tensor,
        dstate: Tensor,
        decays: bool,
    ) -> Gradients:
        inner, states = made
        q, w = gates.rows(q, space(q)), gates.columns(k, space(k))
        y, do = v.contiguous(), space(do).copy_(do)
        dinner = gates.mask_(do @ y.mT)
        dv = inner.mT @ do
        do = gates.reading(do, do)
        dstates = torch.empty_like(states)
        dstates[-1] = dstate
        torch.matmul(q.mT, do, out=dstates[:-1])
        for chunk in reversed(range(len(q))):
            add_kept(gates.keep(chunk), dstates[chunk + 1], dstates[chunk])
        add_products(dv, gates.writing(w), dstates[1:])
        dq = add_products(do @ states[:-1].mT, dinner, w)
        dw = y @ dstates[1:].mT
        dw = add_products(gates.writing(dw, dw), dinner.mT, q)
        dlog = gates.log_grad([(q, dq)], [(w, dw)], states, dstates) if decays else None
        return gates.rows(dq, dq), gates.columns(dw, dw), dv, dlog, None, gates.enter(dstates[0])


class DeltaRule(Rule):
    """Rule delta, with step sizes beta [C, B, G, L, 1]."""

    @staticmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        assert beta is not None
        w, x = torch.mul(k, beta, out=space(k)), space(v).copy_(v)
        q, k, w = gates.rows(q, space(q)), gates.rows(k, space(k)), gates.columns(w, w)
        # Written out: a product with a transpose takes three times that of one without.
        across = w.mT.contiguous()
        inner, keys = gates.mask_(q @ across), gates.mask_(k @ across)
        unit = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
        # The solver reads what is below the diagonal, and takes the diagonal for ones. From the right, where rows
        # are columns to LAPACK, it takes half of the time that it takes from the left.
        inverse = torch.linalg.solve_triangular(keys, unit, upper=False, left=False, unitriangular=True)
        states = state.new_empty(len(q) + 1, *state.shape)
        states[0] = gates.enter(state)
        y = torch.empty_like(x)
        # Batch and heads as one axis, for products that write where the result belongs.
        parts = (
            z.flatten(1, 2).unbind() for z in (gates.reading(k, k), gates.writing(w, w).mT, inverse, x, y)
        )
        flat = states.flatten(1, 2).unbind()
        for chunk, (read, write, solve, x_, y_) in enumerate(zip(*parts, strict=True)):
            torch.baddbmm(x_, read, flat[chunk], alpha=-1, out=x_)
            torch.bmm(solve, x_, out=y_)
            torch.bmm(write, y_, out=flat[chunk + 1])
            add_kept(gates.keep(chunk), states[chunk], states[chunk + 1])
        o = add_products(gates.reading(q, q) @ states[:-1], inner, y)
        return o, states[-1], (y, inner, inverse, states)

    @staticmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        do: Tensor,
        dstate: Tensor,
        decays: bool,
    ) -> Gradients:
        assert beta is not None
        y, inner, inverse, states = made
        w, do = torch.mul(k, beta, out=space(k)), space(do).copy_(do)
        q, rows, w = gates.rows(q, space(q)), gates.rows(k, space(k)), gates.columns(w, w)
        across = y.mT.contiguous()
        dinner = gates.mask_(do @ across)
        dy = inner.mT @ do
        dv = torch.empty_like(dy)
        do = gates.reading(do, do)
        dstates = torch.empty_like(states)
        dstates[-1] = dstate
        torch.matmul(q.mT, do, out=dstates[:-1])
        parts = [
            z.flatten(1, 2).unbind() for z in (gates.reading(rows).mT, gates.writing(w), inverse.mT, dy, dv)
        ]
        dflat = dstates.flatten(1, 2).unbind()
        for chunk in reversed(range(len(q))):
            read, write, solve, dy_, dv_ = (part[chunk] for part in parts)
            torch.baddbmm(dy_, write, dflat[chunk + 1], out=dy_)
            torch.bmm(solve, dy_, out=dv_)
            add_kept(gates.keep(chunk), dstates[chunk + 1], dstates[chunk])
            torch.baddbmm(dflat[chunk], read, dv_, alpha=-1, out=dflat[chunk])
        dkeys = gates.mask_(dv @ across)
        dkeys.diagonal(dim1=-2, dim2=-1).zero_()
        before = states[:-1].mT.contiguous()
        dq = add_products(do @ before, dinner, w)
        # The system has these rows on its other side, so the sign turns.
        drows = dv @ before
        drows = add_products(gates.reading(drows, drows), dkeys, w, factor=-1, share=-1)
        dw = y @ dstates[1:].mT
        dw = add_products(gates.writing(dw, dw), dinner.mT, q)
        add_products(dw, dkeys.mT, rows, factor=-1)
        dlog = None
        if decays:
            dlog = gates.log_grad([(q, dq), (rows, drows)], [(w, dw)], states, dstates)
        dq, drows, dw = gates.rows(dq, dq), gates.rows(drows, drows), gates.columns(dw, dw)
        dbeta = torch.linalg.vecdot(k, dw)[..., None]
        return dq, drows.addcmul_(dw, beta), dv, dlog, dbeta, gates.enter(dstates[0])


class Chunks(torch.autograd.Function):
    """A rule over a whole sequence of [B, T, G, *], T a multiple of `size`, `count` chunks at a time.

    Gives o [B, T, G, V] and the final state [B, G, K, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        rule: type[Rule],
        gates_of: type[Gates],
        size: int,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        o = space(v)
        kept: list[Tensor] = []
        for q_, k_, v_, log_, beta_, o_ in slabs((q, k, v, log, beta, o), size, count):
            found, state, made = rule.forward(gates_of(log_), q_, k_, v_, beta_, state)
            o_.copy_(found)
            if any(ctx.needs_input_grad):
                kept.extend(made)
        ctx.save_for_backward(q, k, v, log, beta, *kept)
        ctx.how = rule, gates_of, size, count
        return o, state.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> Gradients:
        rule, gates_of, size, count = ctx.how
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        decays = ctx.needs_input_grad[3]
        grads = [None if x is None or (x is inputs[3] and not decays) else space(x) for x in inputs]
        parts = list(zip(slabs(inputs, size, count), slabs((do, *grads), size, count), strict=True))
        each = len(kept) // len(parts)
        for slab, ((q, k, v, log, beta), (do_, *into)) in reversed(list(enumerate(parts))):
            made = kept[each * slab : each * (slab + 1)]
            *found, dstate = rule.backward(gates_of(log), made, q, k, v, beta, do_, dstate, decays)
            for grad, value in zip(into, found, strict=True):
                if value is not None:
                    grad.copy_(value)
        return *grads, dstate, None, None, None, None


def slabs(tensors: Sequence[Tensor | None], size: int, count: int) -> list[tuple[Any, ...]]:
    """Views of [B, T, G, *] in chunks, [C, B, G, size, *], and at most `count` of these in each slab."""
    chunks = [
        None if x is None else x.view(len(x), -1, size, *x.shape[2:]).permute(1, 0, 3, 2, 4) for x in tensors
    ]
    total = next(len(x) for x in chunks if x is not None)
    return [tuple(None if x is None else x[i : i + count] for x in chunks) for i in range(0, total, count)]


def add_kept(keep: Tensor | None, state: Tensor, total: Tensor) -> None:
    """Add keep * state to `total`, in place; no factor is one."""
    if keep is None:
        total += state
    else:
        total.addcmul_(state, keep)


def add_products(total: Tensor, x: Tensor, y: Tensor, *, factor: int = 1, share: int = 1) -> Tensor:
    """`total` becomes share * total + factor * x @ y, in place."""
    total_, x_, y_ = (z.flatten(0, -3) for z in (total, x, y))
    # Not `baddbmm_`, which torch's FLOP counter does not count.
    torch.baddbmm(total_, x_, y_, beta=share, alpha=factor, out=total_)
    return total


def space(view: Tensor) -> Tensor:
    """Room for a contiguous copy."""
    return torch.empty(view.shape, dtype=view.dtype, device=view.device)
