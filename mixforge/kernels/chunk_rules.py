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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.chunk_gates import Gates, each_state, fill

# Key channels, below which what an adjoint has of them lies by columns: products that fill rows of a few channels
# take two to three times as long.
NARROW = 16

# q, k, v, log decays and beta, or their gradients.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What queries and keys are multiplied by, [C, B, G, 1, L, 1], to have the lengths `length` and 1."""

    q: Tensor
    k: Tensor
    length: float


@dataclass(frozen=True, slots=True)
class States:
    """The states [C + 1, B, G, K, V] around C chunks, or their gradients: what chunks leave, and what they begin with.

    Both are one memory, but where sequences are packed. Then a `table` holds one of the two, and behind its C + 1 states
    those that are given where a sequence begins; `sources` says for each place which of them [1] the other one has.
    """

    left: Tensor
    begun: Tensor
    table: Tensor | None = None
    sources: tuple[Tensor, ...] = ()

    def before(self) -> Tensor:
        """Those before the chunks, [C * B * G, K, V]."""
        return self.begun[:-1].flatten(0, 2)

    def after(self) -> Tensor:
        """Those after the chunks, [C * B * G, K, V]."""
        return self.left[1:].flatten(0, 2)

    def each(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As matrices [B * G, K, V], what chunks leave and what they begin with."""
        left = each_state(self.left)
        return left, left if self.table is None else each_state(self.begun)

    def cross(self, place: int, there: Tensor) -> None:
        """Fill `there`, the side of a place that is not in the table."""
        if self.table is not None:
            torch.index_select(self.table, 0, self.sources[place], out=there[None])


class Forward(ABC):
    """The forward pass of a rule, slab by slab. Tensors are [C, B, G, 1, L, *], views of any strides.

    What one operation leaves for the next has room of its own, made once with the views into it: new tensors for every
    slab take longer than some of the operations.
    """

    @abstractmethod
    def __init__(self, q: Tensor, v: Tensor) -> None:
        """Room for slabs that are shaped as these."""

    @abstractmethod
    def run(
        self, gates: Gates, inputs: Inputs, units: Units | None, states: States, o: Tensor
    ) -> tuple[Tensor, ...]:
        """Fills o and, but for the first that is left, the states. Returns what the adjoint needs."""


class Adjoint(ABC):
    """The adjoint of a rule, slab by slab from the last, with room as in `Forward`."""

    @abstractmethod
    def __init__(self, gates: Gates, q: Tensor, v: Tensor) -> None:
        """Room for slabs that are shaped as these."""

    @abstractmethod
    def run(
        self,
        gates: Gates,
        states: States,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        units: Units | None,
        do: Tensor,
        dstates: States,
        grads: Inputs,
    ) -> None:
        """Fills the gradients, that of the log decays where it is not None, and but for the last those of the states."""


class AddForward(Forward):
    """Rule add, of values times beta where there is one; `write` may put a column beside them."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.q, self.w, self.y = space(q), space(q), space(v)
        self.q_, self.w_, self.y_ = matrices(self.q), matrices(self.w), matrices(self.y)
        self.o_ = torch.empty_like(self.y_)

    def run(
        self, gates: Gates, inputs: Inputs, units: Units | None, states: States, o: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v, _, beta = inputs
        q, w, y = gates.rows(q, self.q), gates.columns(k, self.w), write(self.y, v, beta)
        q_, w_, y_ = self.q_, self.w_, self.y_
        inner = gates.mask_(torch.bmm(q_, w_.mT))
        gates.reading(q, q)
        gates.writing(w, w)
        left, begun = states.each()
        torch.bmm(w_.mT, y_, out=states.after())
        for chunk, keep in enumerate(gates.keeps(states.left)):
            states.cross(chunk, begun[chunk])
            add_kept(keep, begun[chunk], left[chunk + 1])
        o.copy_(add_product(torch.bmm(q_, states.before(), out=self.o_), inner, y_).view_as(y))
        return (inner,)


class AddAdjoint(Adjoint):
    """The adjoint of the rule add."""

    def __init__(self, gates: Gates, q: Tensor, v: Tensor) -> None:
        of_keys = columns if q.shape[-1] < NARROW else space
        self.q, self.w, self.y, self.do = of_keys(q), of_keys(q), space(v), space(v)
        self.dq, self.dw, self.dv = of_keys(q), of_keys(q), space(v)

    def run(
        self,
        gates: Gates,
        states: States,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        units: Units | None,
        do: Tensor,
        dstates: States,
        grads: Inputs,
    ) -> None:
        (inner,) = made
        q, k, v, _, beta = inputs
        into_q, into_k, into_v, into_log, into_beta = grads
        q, w, y = gates.rows(q, self.q), gates.columns(k, self.w), write(self.y, v, beta)
        do = self.do.copy_(do)
        q_, w_, y_, do_ = matrices(q), matrices(w), matrices(y), matrices(do)
        dq_, dw_, dv_ = matrices(self.dq), matrices(self.dw), matrices(self.dv)
        dinner = gates.mask_(torch.bmm(do_, y_.mT))
        torch.bmm(inner.mT, do_, out=dv_)
        gates.reading(do, do)
        (left, begun), keeps = dstates.each(), gates.keeps(states.left)
        torch.bmm(q_.mT, do_, out=dstates.before())
        for chunk in reversed(range(len(q))):
            add_kept(keeps[chunk], left[chunk + 1], begun[chunk])
            dstates.cross(chunk, left[chunk])
        dafter = dstates.after()
        add_product(dv_, matrices(gates.writing(w, self.dw)), dafter)
        fill_product(dq_, do_, states.before().mT)
        fill_product(dw_, y_, dafter.mT)
        dv = self.dv[..., : v.shape[-1]]
        if beta is None:
            into_v.copy_(dv)
        else:
            assert into_beta is not None
            fill(into_v, torch.mul, dv, beta)
            # What is left is that of the column of ones.
            dv.mul_(v)
            into_beta.copy_(sum_last(self.dv))
        gates.writing(self.dw, self.dw)
        add_product(dq_, dinner, w_)
        add_product(dw_, dinner.mT, q_)
        if into_log is not None:
            along = q.mul_(self.dq).sub_(w.mul_(self.dw))
            gates.log_grad(along, states.left, dstates.left, into_log)
        gates.rows(self.dq, into_q)
        gates.columns(self.dw, into_k)


class DeltaForward(Forward):
    """Rule delta, with step sizes beta [C, B, G, 1, L, 1]."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.q, self.k, self.w, self.x = space(q), space(q), space(q), space(v)
        self.q_, self.k_, self.w_, self.x_ = (matrices(z) for z in (self.q, self.k, self.w, self.x))
        self.chunks = by_chunk(len(q), self.k_, self.w_.mT, self.x_)
        # Of columns, as the solver has its right hand side: it would turn every copy of these by itself.
        self.unit = torch.eye(q.shape[4], dtype=q.dtype, device=q.device).mT
        self.keys = q.new_empty(len(self.w_), *self.unit.shape)

    def run(
        self, gates: Gates, inputs: Inputs, units: Units | None, states: States, o: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v, _, beta = inputs
        assert beta is not None
        if units is not None:
            q, k = fill(self.q, torch.mul, q, units.q), fill(self.k, torch.mul, k, units.k)
        w, x = fill(self.w, torch.mul, k, beta), self.x.copy_(v)
        q, k, w = gates.rows(q, self.q), gates.rows(k, self.k), gates.columns(w, w)
        q_, w_, x_ = self.q_, self.w_, self.x_
        inner, keys = gates.mask_(torch.bmm(q_, w_.mT)), torch.bmm(self.k_, w_.mT, out=self.keys)
        gates.scale_(keys)
        # The solver reads what is below the diagonal, and takes the diagonal for ones. From the right, where the
        # rows of a tensor are LAPACK's columns, it takes a third of the time that it takes from the left.
        inverse = torch.linalg.solve_triangular(keys, self.unit, upper=False, left=False, unitriangular=True)
        gates.reading(q, q)
        gates.reading(k, k)
        gates.writing(w, w)
        y_ = torch.empty_like(x_)
        (left, begun), keeps = states.each(), gates.keeps(states.left)
        made = by_chunk(len(q), inverse, y_)
        for chunk, (read, write, x_c) in enumerate(self.chunks):
            solve, y_c = made[chunk]
            states.cross(chunk, begun[chunk])
            torch.baddbmm(x_c, read, begun[chunk], alpha=-1, out=x_c)
            torch.bmm(solve, x_c, out=y_c)
            keep_state(keeps[chunk], begun[chunk], left[chunk + 1])
            add_product(left[chunk + 1], write, y_c)
        # What was solved is not needed any more.
        add_product(torch.bmm(q_, states.before(), out=x_), inner, y_)
        o.copy_(x)
        return y_, inner, inverse


class DeltaAdjoint(Adjoint):
    """The adjoint of the rule delta.

    Below the rows of q stand those of -k in one matrix, for both are multiplied by the same: what -k reads is added to
    the right hand side of the system, whose adjoint stands below that of the output.
    """

    def __init__(self, gates: Gates, q: Tensor, v: Tensor) -> None:
        of_keys = columns if q.shape[-1] < NARROW else space
        self.rows, self.w = of_keys(q, 2), of_keys(q)
        self.down, self.dy, self.dv = space(v, 2), space(v), space(v)
        self.drows, self.dw = of_keys(q, 2), of_keys(q)
        # What reads the states has its room where the gradient of rows comes later.
        reading = matrices(self.rows if gates.read is None else self.drows).mT
        down, size = matrices(self.down), q.shape[4]
        self.chunks = by_chunk(len(q), reading, down, down[:, size:], matrices(self.dy), matrices(self.dv))

    def run(
        self,
        gates: Gates,
        states: States,
        made: tuple[Tensor, ...],
        inputs: Inputs,
        units: Units | None,
        do: Tensor,
        dstates: States,
        grads: Inputs,
    ) -> None:
        y_, inner, inverse = made
        q, k, _, _, beta = inputs
        assert beta is not None
        rows, drows, dv, dw = self.rows, self.drows, self.dv, self.dw
        of_q, of_k = rows.chunk(2, 3)
        if units is None:
            of_q.copy_(q)
            fill(of_k, torch.neg, k)
        else:
            fill(of_q, torch.mul, q, units.q)
            fill(of_k, torch.mul, k, -units.k)
        # Factors that lie apart take three times as long, where rows are narrow.
        beta = beta.contiguous()
        w = fill(self.w, torch.mul, of_k, -beta)
        gates.columns(w, w)
        gates.rows(rows, rows)
        self.down.chunk(2, 3)[0].copy_(do)
        rows_, w_, down_, drows_, dw_ = (matrices(z) for z in (rows, w, self.down, drows, dw))
        do_ = down_[:, : inner.shape[1]]
        torch.bmm(inner.mT, do_, out=matrices(self.dy))
        (left, begun), keeps = dstates.each(), gates.keeps(states.left)
        gates.reading(rows, drows)
        # What is written has its room where the gradient of w comes later.
        written = by_chunk(len(q), matrices(gates.writing(w, dw)), inverse.mT)
        for chunk in reversed(range(len(q))):
            read, down_c, of_k_c, dy_c, dv_c = self.chunks[chunk]
            write, solve = written[chunk]
            torch.baddbmm(dy_c, write, left[chunk + 1], out=dy_c)
            torch.bmm(solve, dy_c, out=dv_c)
            of_k_c.copy_(dv_c)
            keep_state(keeps[chunk], left[chunk + 1], begun[chunk])
            add_product(begun[chunk], read, down_c)
            dstates.cross(chunk, left[chunk])
        grads[2].copy_(dv)
        dgrams = gates.mask_(torch.bmm(down_, y_.mT))
        dgrams[:, inner.shape[1] :].diagonal(dim1=-2, dim2=-1).zero_()
        fill_product(drows_, down_, states.before().mT)
        fill_product(dw_, y_, dstates.after().mT)
        gates.reading(drows, drows)
        gates.writing(dw, dw)
        add_product(drows_, dgrams, w_)
        add_product(dw_, dgrams.mT, rows_)
        # Room for what follows.
        del dgrams
        self.pass_on(gates, units, beta, states, dstates, grads)

    def pass_on(
        self,
        gates: Gates,
        units: Units | None,
        beta: Tensor,
        states: States,
        dstates: States,
        grads: Inputs,
    ) -> None:
        """Fill the gradients but for that of the values, from those of rows and of w."""
        into_q, into_k, _, into_log, into_beta = grads
        assert into_beta is not None
        rows, w, drows, dw = self.rows, self.w, self.drows, self.dw
        (of_q, of_k), (dof_q, dof_k) = rows.chunk(2, 3), drows.chunk(2, 3)
        gates.columns(dw, dw)
        # Of one decay for all channels the sum over these is enough, and so it is of lengths.
        is_one = gates.read is not None
        along = None
        if units is not None or (into_log is not None and is_one):
            along_q = fill(w, torch.mul, of_q, dof_q).sum(-1, keepdim=True)
            along_k = fill(w, torch.mul, of_k, dof_k).sum(-1, keepdim=True)
            along = along_q + along_k
        if into_log is not None and not is_one:
            along = (of_q * dof_q).addcmul_(of_k, dof_k)
        # As they were before `rows`.
        gates.columns(rows, rows)
        along_w = fill(w, torch.mul, of_k, dw).sum(-1, keepdim=True)
        fill(into_beta, torch.neg, along_w)
        if into_log is not None:
            assert along is not None
            along.addcmul_(along_w if is_one else w, beta)
            gates.log_grad(along, states.left, dstates.left, into_log)
        gates.rows(drows, drows)
        fill(dof_k, torch.addcmul, dof_k, dw, -beta)
        if units is None:
            into_q.copy_(dof_q)
            fill(into_k, torch.neg, dof_k)
            return
        # A row that was made r long has no gradient along itself.
        along_q.mul_(units.length**-2)
        along_k.addcmul_(along_w, beta, value=-1)
        drows.addcmul_(rows, torch.cat((along_q, along_k), 3), value=-1)
        drows.mul_(torch.cat((units.q, -units.k), 3))
        into_q.copy_(dof_q)
        into_k.copy_(dof_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule by its two passes."""

    forward: type[Forward]
    adjoint: type[Adjoint]


ADD = Rule(forward=AddForward, adjoint=AddAdjoint)
DELTA = Rule(forward=DeltaForward, adjoint=DeltaAdjoint)


class Chunks(torch.autograd.Function):
    """A rule over a whole sequence of [B, T, G, *], T a multiple of `size`, `count` chunks at a time.

    Gives o [B, T, G, V] and the final state [B, G, K, V]. Of N packed sequences states are [N, G, K, V]; `edges` [N + 1]
    are their first chunks, whose first rows are empty, and the chunk behind the last.

    For a `unit` see `Units`. Powers that are made already stand for log decays. Where it `is_summed`, V is one more
    than values have, for a column of ones beside them.
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
        rule: Rule,
        gates_of: type[Gates],
        size: int,
        count: int,
        unit: float | None,
        is_summed: bool,
        made_powers: tuple[Tensor, ...] | None,
        edges_N1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*v.shape[:-1], v.shape[-1] + int(is_summed))
        lengths = () if unit is None else (inverse_lengths(q).mul_(unit), inverse_lengths(k))
        # Without gradients a slab's states and powers take the place of those of the slab before, but where states of
        # sequences that end in any slab are asked for.
        is_kept = any(ctx.needs_input_grad) or edges_N1 is not None
        whole = [cut(x, size) for x in (q, k, v, log, beta, o, *lengths)]
        powers = made_powers
        if powers is None:
            powers = gates_of.powers(whole[3]) if is_kept else ()
        chunks = q.shape[1] // size
        table: Tensor | None = None
        sources: tuple[Tensor, ...] = ()
        if edges_N1 is None:
            states = begun = state.new_empty((chunks if is_kept else min(count, chunks)) + 1, *state.shape)
        else:
            table, sources = table_of(chunks, state, edges_N1[:-1])
            states, state = table[: chunks + 1, None], state[:1]
            begun = torch.empty_like(states)
        kept: list[Tensor] = []
        passes: dict[int, Forward] = {}
        for slab, (q_, k_, v_, log_, beta_, o_, *others) in enumerate(slabs((*whole, *powers), count)):
            inputs = q_, k_, v_, log_, beta_
            units, powers_ = units_of(others, unit), others[len(lengths) :]
            gates = gates_of(*(powers_ or gates_of.powers(log_)))
            # The last slab may be shorter.
            if len(o_) not in passes:
                passes[len(o_)] = rule.forward(q_, o_)
            first = slab * count if is_kept else 0
            span = slice(first, first + len(o_) + 1)
            here = States(states[span], begun[span], table, sources[span])
            if slab == 0 or not is_kept:
                here.left[0] = gates.enter(state)
            made = passes[len(o_)].run(gates, inputs, units, here, o_)
            state = here.left[-1]
            if is_kept:
                kept.extend(made)
        ctx.save_for_backward(q, k, v, log, beta, states, begun, edges_N1, *lengths, *powers, *kept)
        ctx.how = rule, gates_of, size, count, unit, len(powers)
        return o, state.clone() if edges_N1 is None else states[:, 0].index_select(0, edges_N1[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        rule, gates_of, size, count, unit, of_gates = ctx.how
        inputs, made = ctx.saved_tensors[:5], ctx.saved_tensors[8:]
        states, begun, edges_N1 = ctx.saved_tensors[5:8]
        of_units = 0 if unit is None else 2
        lengths, kept = made[:of_units], made[of_units + of_gates :]
        powers = made[of_units : of_units + of_gates]
        decays = ctx.needs_input_grad[3]
        grads = [None if x is None or (x is inputs[3] and not decays) else space(x) for x in inputs]
        parts = slabs((*(cut(x, size) for x in (do, *inputs, *grads, *lengths)), *powers), count)
        each = len(kept) // len(parts)
        room = states.new_empty(len(parts[0][0]) + 1, *states.shape[1:])
        dbegun, table = room, None
        sources: tuple[Tensor, ...] = ()
        if edges_N1 is not None:
            table, sources = table_of(len(states) - 1, dstate, edges_N1[1:])
            dbegun, dstate = table[: len(states), None], table.index_select(0, sources[-1])
        passes: dict[int, Adjoint] = {}
        for slab, (do_, *others) in reversed(list(enumerate(parts))):
            tokens, into, units = others[:5], others[5:10], units_of(others[10:], unit)
            gates = gates_of(*others[10 + of_units :])
            if len(do_) not in passes:
                passes[len(do_)] = rule.adjoint(gates, tokens[0], do_)
            span = slice(slab * count, slab * count + len(do_) + 1)
            here, dleft = States(states[span], begun[span]), room[: len(do_) + 1]
            dleft[-1] = dstate
            dhere = States(dleft, dleft if table is None else dbegun[span], table, sources[span])
            made = kept[each * slab : each * (slab + 1)]
            passes[len(do_)].run(gates, here, made, tokens, units, do_, dhere, into)
            dstate = room[0]
        # The gates of the first slab.
        dstate = gates.enter(dstate) if edges_N1 is None else dbegun[:, 0].index_select(0, edges_N1[:-1])
        return *grads, dstate, None, None, None, None, None, None, None, None


def table_of(chunks: int, given_NGKV: Tensor, places_N: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The `table` and `sources` of `States`, with room for what is around chunks."""
    count = chunks + 1
    table = given_NGKV.new_empty(count + len(given_NGKV), *given_NGKV.shape[1:])
    # Nothing comes from behind the last chunk.
    table[chunks] = 0
    table[count:] = given_NGKV
    numbers = torch.arange(len(table), device=table.device)
    return table, numbers[:count].index_copy(0, places_N, numbers[count:])[:, None].unbind()


def inverse_lengths(x: Tensor) -> Tensor:
    """1 / sqrt(|x|^2 + 1e-6) over the last axis, which stays with size 1."""
    return sum_last((x * x).contiguous()).add_(1e-6).rsqrt_()


def sum_last(x: Tensor) -> Tensor:
    """The sum over the last axis of a contiguous tensor, which stays with size 1."""
    # A product with ones takes less than half of the time of a sum over a short axis.
    return torch.mv(x.view(-1, x.shape[-1]), x.new_ones(x.shape[-1])).view(*x.shape[:-1], 1)


def write(room: Tensor, v: Tensor, beta: Tensor | None) -> Tensor:
    """Fill `room` with beta v, and what it has beside that with beta; no beta is one."""
    values, beside = room[..., : v.shape[-1]], room[..., v.shape[-1] :]
    if beta is None:
        values.copy_(v)
        beside.fill_(1)
    else:
        fill(values, torch.mul, v, beta)
        beside.copy_(beta)
    return room


def units_of(lengths: Sequence[Tensor], unit: float | None) -> Units | None:
    """The first two tensors as units, where there is a length."""
    return None if unit is None else Units(q=lengths[0], k=lengths[1], length=unit)


def cut(x: Tensor | None, size: int) -> Tensor | None:
    """[B, T, G, *] as a view in chunks, [C, B, G, 1, size, *]."""
    if x is None:
        return None
    batch, _, heads, dim = x.shape
    return x.view(batch, -1, size, heads, 1, dim).permute(1, 0, 3, 4, 2, 5)


def slabs(of_all: Sequence[Tensor | None], count: int) -> list[tuple[Any, ...]]:
    """Views of [C, *], at most `count` chunks in each slab."""
    total = next(len(x) for x in of_all if x is not None)
    if total <= count:
        return [tuple(of_all)]
    return [tuple(None if x is None else x[i : i + count] for x in of_all) for i in range(0, total, count)]


def by_chunk(count: int, *of_all: Tensor) -> list[tuple[Tensor, ...]]:
    """For each chunk, its part of matrices [C * B * G, *, *]."""
    return list(zip(*(x.chunk(count) for x in of_all), strict=True))


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


def fill_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Fill `out`, by rows or by columns, with x @ y."""
    # As it lies in memory: torch would multiply the others one by one.
    if out.is_contiguous():
        torch.bmm(x, y, out=out)
    else:
        torch.bmm(y.mT, x.mT, out=out.mT)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`total`, as in `fill_product`, becomes total + x @ y, in place."""
    # Not `baddbmm_`, which torch's FLOP counter does not count.
    if total.is_contiguous():
        return torch.baddbmm(total, x, y, out=total)
    return torch.baddbmm(total.mT, y.mT, x.mT, out=total.mT).mT


def space(view: Tensor, roles: int = 1) -> Tensor:
    """Room for a contiguous copy, or in [C, B, G, 1, L, *] for as many as there are roles."""
    shape = list(view.shape)
    if roles > 1:
        shape[3] = roles
    return view.new_empty(shape)


def columns(view: Tensor, roles: int = 1) -> Tensor:
    """As `space`, with the columns of `matrices` one after the other in memory."""
    *sizes, _, rows, dim = view.shape
    return view.new_empty(*sizes, dim, roles, rows).permute(0, 1, 2, 4, 5, 3)
