"""The rules add and delta over all chunks of a sequence, each with its adjoint.

In a chunk that starts from the state S0, with the products of `chunk_gates`:

    Y = V, W = K                                                                rule add
    (I + A) Y = V - reading(K) S0,  W = beta K,  A_ij = gram(K, W)_ij for i > j         rule delta
    O = reading(Q) S0 + gram(Q, W) Y
    S1 = keep(S0) + writing(W)^T Y

The triangular system is solved by substitution: a Neumann series or repeated squaring fails for keys that
resemble one another. The adjoint runs over the chunks backwards, from the states between them; it keeps those,
Y, the products of rows and the powers of decays, and makes the scaled rows again.

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

# q, k, v, log decays and beta, or their gradients.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Rule(ABC):
    """One rule over the chunks of a slab, and its adjoint. Tensors are [C, B, G, 1, L, *], views of any strides."""

    @staticmethod
    @abstractmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor, o: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Fills o. Returns the state after the last chunk, [B, G, K, V], and what `backward` needs."""

    @staticmethod
    @abstractmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        do: Tensor,
        dstate: Tensor,
        grads: Inputs,
    ) -> Tensor:
        """Fills the gradients, that of the log decays where it is not None. Returns that of the state."""


class AddRule(Rule):
    """Rule add."""

    @staticmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor, o: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, w, y = gates.rows(q, space(q)), gates.columns(k, space(k)), v.contiguous()
        q_, w_, y_ = matrices(q), matrices(w), matrices(y)
        inner = gates.mask_(torch.bmm(q_, w_.mT))
        gates.reading(q, q)
        gates.writing(w, w)
        states = state.new_empty(len(q) + 1, *state.shape)
        before, after = neighbours(states)
        states[0] = gates.enter(state)
        torch.bmm(w_.mT, y_, out=after)
        each = states.unbind()
        for chunk, keep in enumerate(gates.keeps(len(q))):
            add_kept(keep, each[chunk], each[chunk + 1])
        o.copy_(add_product(torch.bmm(q_, before), inner, y_).view_as(y))
        return each[-1], (inner, states)

    @staticmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        do: Tensor,
        dstate: Tensor,
        grads: Inputs,
    ) -> Tensor:
        inner, states = made
        q, k, v, _, _ = inputs
        into_q, into_k, into_v, into_log, _ = grads
        q, w = gates.rows(q, space(q)), gates.columns(k, space(k))
        y, do = v.contiguous(), space(do).copy_(do)
        q_, w_, y_, do_ = matrices(q), matrices(w), matrices(y), matrices(do)
        dinner = gates.mask_(torch.bmm(do_, y_.mT))
        dv = torch.bmm(inner.mT, do_)
        gates.reading(do, do)
        dstates = torch.empty_like(states)
        dbefore, dafter = neighbours(dstates)
        dstates[-1] = dstate
        torch.bmm(q_.mT, do_, out=dbefore)
        each, keeps = dstates.unbind(), gates.keeps(len(q))
        for chunk in reversed(range(len(q))):
            add_kept(keeps[chunk], each[chunk + 1], each[chunk])
        into_v.copy_(add_product(dv, matrices(gates.writing(w)), dafter).view_as(y))
        before, _ = neighbours(states)
        dq_, dw_ = torch.bmm(do_, before.mT), torch.bmm(y_, dafter.mT)
        dq, dw = dq_.view_as(q), dw_.view_as(w)
        gates.writing(dw, dw)
        add_product(dq_, dinner, w_)
        add_product(dw_, dinner.mT, q_)
        if into_log is not None:
            gates.log_grad((q, dq), w.mul_(dw), states, dstates, into_log)
        gates.rows(dq, into_q)
        gates.columns(dw, into_k)
        return gates.enter(each[0])


class DeltaRule(Rule):
    """Rule delta, with step sizes beta [C, B, G, 1, L, 1].

    In the adjoint the rows of k stand below those of q in one matrix, for both are multiplied by the same.
    """

    @staticmethod
    def forward(
        gates: Gates, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor, o: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert beta is not None
        w, x = torch.mul(k, beta, out=space(k)), space(v).copy_(v)
        q, k, w = gates.rows(q, space(q)), gates.rows(k, space(k)), gates.columns(w, w)
        q_, k_, w_, x_ = matrices(q), matrices(k), matrices(w), matrices(x)
        inner, keys = gates.mask_(torch.bmm(q_, w_.mT)), gates.scale_(torch.bmm(k_, w_.mT))
        unit = torch.eye(q.shape[4], dtype=q.dtype, device=q.device)
        # The solver reads what is below the diagonal, and takes the diagonal for ones. From the right, where the
        # rows of a tensor are LAPACK's columns, it takes a third of the time that it takes from the left.
        inverse = torch.linalg.solve_triangular(keys, unit, upper=False, left=False, unitriangular=True)
        gates.reading(q, q)
        gates.reading(k, k)
        gates.writing(w, w)
        states = state.new_empty(len(q) + 1, *state.shape)
        before, after = neighbours(states)
        states[0] = gates.enter(state)
        y_ = torch.empty_like(x_)
        each, keeps = states.unbind(), gates.keeps(len(q))
        parts = zip(*(z.chunk(len(q)) for z in (k_, w_.mT, inverse, x_, y_, before, after)), strict=True)
        for chunk, (read, write, solve, x_c, y_c, before_c, after_c) in enumerate(parts):
            torch.baddbmm(x_c, read, before_c, alpha=-1, out=x_c)
            torch.bmm(solve, x_c, out=y_c)
            keep_state(keeps[chunk], each[chunk], each[chunk + 1])
            add_product(after_c, write, y_c)
        o.copy_(add_product(torch.bmm(q_, before), inner, y_).view_as(x))
        return each[-1], (y_, inner, inverse, states)

    @staticmethod
    def backward(
        gates: Gates,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        do: Tensor,
        dstate: Tensor,
        grads: Inputs,
    ) -> Tensor:
        y_, inner, inverse, states = made
        q, k, _, _, beta = inputs
        into_q, into_k, into_v, into_log, into_beta = grads
        assert beta is not None
        assert into_beta is not None
        rows, w = space(q, 2), torch.mul(k, beta, out=space(k))
        of_q, of_k = rows.chunk(2, 3)
        gates.rows(q, of_q)
        gates.rows(k, of_k)
        gates.columns(w, w)
        # Below the adjoint of what q reads stands that of what k reads, which the system has on its other side.
        down, size = space(do, 2), inner.shape[1]
        down_of_q, down_of_k = down.chunk(2, 3)
        down_of_q.copy_(do)
        down_, rows_, w_ = matrices(down), matrices(rows), matrices(w)
        dy = torch.bmm(inner.mT, down_[:, :size])
        dv_ = torch.empty_like(dy)
        dv = dv_.view(do.shape)
        # What is left of these after `reading`: the states' adjoints come of it, and rows are not scaled for them.
        scaled = down if gates.read is None else space(do, 2)
        scaled_of_q, scaled_of_k = scaled.chunk(2, 3)
        gates.reading(down_of_q, scaled_of_q)
        dstates = torch.empty_like(states)
        dbefore, dafter = neighbours(dstates)
        dstates[-1] = dstate
        each, keeps = dstates.unbind(), gates.keeps(len(q))
        flat = (rows_.mT, matrices(gates.writing(w)), inverse.mT, dy, dv_, matrices(scaled))
        parts = list(zip(*(z.chunk(len(q)) for z in (*flat, dbefore, dafter)), strict=True))
        minus = -dv.new_ones(len(q)) if gates.read is None else -gates.read
        found = list(zip(dv.unbind(), minus.unbind(), scaled_of_k.unbind(), strict=True))
        for chunk in reversed(range(len(q))):
            read, write, solve, dy_c, dv_c, scaled_c, before_c, after_c = parts[chunk]
            torch.baddbmm(dy_c, write, after_c, out=dy_c)
            torch.bmm(solve, dy_c, out=dv_c)
            torch.mul(*found[chunk][:2], out=found[chunk][2])
            keep_state(keeps[chunk], each[chunk + 1], each[chunk])
            add_product(before_c, read, scaled_c)
        if scaled is not down:
            torch.neg(dv, out=down_of_k)
        into_v.copy_(dv)
        dgrams = gates.mask_(torch.bmm(down_, y_.mT))
        dgrams[:, size:].diagonal(dim1=-2, dim2=-1).zero_()
        before, _ = neighbours(states)
        drows_, dw_ = torch.bmm(matrices(scaled), before.mT), torch.bmm(y_, dafter.mT)
        drows, dw = drows_.view_as(rows), dw_.view_as(w)
        gates.writing(dw, dw)
        add_product(drows_, dgrams, w_)
        add_product(dw_, dgrams.mT, rows_)
        gates.columns(dw, dw)
        torch.sum(torch.mul(k, dw, out=w), -1, keepdim=True, out=into_beta)
        if into_log is not None:
            # Of one decay for all channels the sum over these is enough.
            of_columns = beta * (w if gates.read is None else into_beta)
            gates.log_grad((rows, drows), of_columns, states, dstates, into_log)
        dof_q, dof_k = drows.chunk(2, 3)
        gates.rows(dof_q, into_q)
        torch.addcmul(gates.rows(dof_k, dof_k), dw, beta, out=into_k)
        return gates.enter(each[0])


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
        cut = [chunks(x, size) for x in (q, k, v, log, beta, o)]
        powers = gates_of.powers(cut[3])
        kept: list[Tensor] = []
        for q_, k_, v_, log_, beta_, o_, *powers_ in slabs((*cut, *powers), count):
            state, made = rule.forward(gates_of(log_, *powers_), q_, k_, v_, beta_, state, o_)
            if any(ctx.needs_input_grad):
                kept.extend(made)
        ctx.save_for_backward(q, k, v, log, beta, *powers, *kept)
        ctx.how = rule, gates_of, size, count, len(powers)
        return o, state.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        rule, gates_of, size, count, of_gates = ctx.how
        inputs, made = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        powers, kept = made[:of_gates], made[of_gates:]
        decays = ctx.needs_input_grad[3]
        grads = [None if x is None or (x is inputs[3] and not decays) else space(x) for x in inputs]
        cut = [chunks(x, size) for x in (*inputs, do, *grads)]
        parts = slabs((*cut, *powers), count)
        each = len(kept) // len(parts)
        for slab in reversed(range(len(parts))):
            tokens, (do_, *into), powers_ = parts[slab][:5], parts[slab][5:11], parts[slab][11:]
            made = kept[each * slab : each * (slab + 1)]
            dstate = rule.backward(gates_of(tokens[3], *powers_), made, tokens, do_, dstate, into)
        return *grads, dstate, None, None, None, None


def chunks(x: Tensor | None, size: int) -> Tensor | None:
    """[B, T, G, *] as a view in chunks, [C, B, G, 1, size, *]."""
    if x is None:
        return None
    return x.view(len(x), -1, size, *x.shape[2:]).permute(1, 0, 3, 2, 4).unsqueeze(3)


def slabs(tensors: Sequence[Tensor | None], count: int) -> list[tuple[Any, ...]]:
    """Views of at most `count` chunks of each [C, ...]."""
    total = next(len(x) for x in tensors if x is not None)
    return [tuple(None if x is None else x[i : i + count] for x in tensors) for i in range(0, total, count)]


def add_kept(keep: Tensor | None, state: Tensor, total: Tensor) -> None:
    """Add keep * state to `total`, in place; no factor is one."""
    if keep is None:
        total += state
    else:
        total.addcmul_(state, keep)


def keep_state(keep: Tensor | None, state: Tensor, kept: Tensor) -> None:
    """Fill `kept` with keep * state; no factor is one."""
    if keep is None:
        kept.copy_(state)
    else:
        torch.mul(state, keep, out=kept)


def matrices(x: Tensor) -> Tensor:
    """[C, B, G, R, L, *] as matrices with the rows of all roles below one another, [C * B * G, R * L, *]."""
    return x.view(-1, x.shape[3] * x.shape[4], x.shape[5])


def neighbours(states: Tensor) -> tuple[Tensor, Tensor]:
    """The states [C + 1, B, G, K, V] before the chunks and after them, each [C * B * G, K, V]."""
    return states[:-1].flatten(0, 2), states[1:].flatten(0, 2)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`total` becomes total + x @ y, in place."""
    # Not `baddbmm_`, which torch's FLOP counter does not count.
    return torch.baddbmm(total, x, y, out=total)


def space(view: Tensor, roles: int = 1) -> Tensor:
    """Room for a contiguous copy, or in [C, B, G, 1, L, *] for as many as there are roles."""
    shape = list(view.shape)
    if roles > 1:
        shape[3] = roles
    return torch.empty(shape, dtype=view.dtype, device=view.device)
