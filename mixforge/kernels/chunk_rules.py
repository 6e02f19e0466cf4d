"""The rules add and delta over all chunks of a sequence, each with its adjoint.

In a chunk that starts from the state S0, with the products of `chunk_gates`:

    U = V                                                                       rule add
    (I + A) U = beta X,  X = V - reading(K) S0,  A_ij = beta_i gram(K, K)_ij for i > j        rule delta
    O = reading(Q) S0 + gram(Q, K) U
    S1 = keep(S0) + writing(K)^T U

The triangular system is solved by substitution: a Neumann series or repeated squaring fails for keys that
resemble one another. The adjoint runs over the chunks backwards, from the states between them; it keeps
those, U, X and the products of rows, and makes the scalings again.

Source: Yang et al. 2024 (arXiv 2406.06484, section 3.2) and Yang, Kautz and Hatamizadeh 2024
(arXiv 2412.06464, section 3.3). Departure: U comes from X chunk by chunk; the matrix W of those papers is
never formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.chunk_gates import Gates

# The adjoints' arguments without a gradient come back as None.
Gradients = tuple[Tensor | None, ...]


def add_products(total: Tensor, x: Tensor, y: Tensor, factor: int = 1) -> None:
    """Add factor * x @ y to `total`, [N, *, *] each, in place."""
    # Not `baddbmm_`, which torch's FLOP counter does not count.
    torch.baddbmm(total, x, y, alpha=factor, out=total)


class AddChunks(torch.autograd.Function):
    """Rule add, from q, k, v, log decays, None, the first state and a kind of gates.

    Gives o [C, B, G, L, V] and the final state [B, G, K, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log: Tensor | None,
        beta: None,
        state: Tensor,
        gates_of: type[Gates],
    ) -> tuple[Tensor, Tensor]:
        gates = gates_of(log)
        inner = gates.gram(q, k)
        states = state.new_empty(q.shape[0] + 1, *state.shape)
        states[0] = state
        for chunk, write in enumerate((gates.writing(k).mT @ v).unbind(0)):
            torch.add(gates.keep(chunk, states[chunk]), write, out=states[chunk + 1])
        o = gates.reading(q) @ states[:-1]
        add_products(o.flatten(0, 2), inner.flatten(0, 2), v.flatten(0, 2))
        ctx.save_for_backward(q, k, v, log, inner, states)
        ctx.gates_of = gates_of
        return o, states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> Gradients:
        q, k, v, log, inner, states = ctx.saved_tensors
        gates: Gates = ctx.gates_of(log)
        do = do.contiguous()
        dstates = torch.empty_like(states)
        dstates[-1] = dstate
        reads = gates.reading(q).mT @ do
        for chunk in reversed(range(q.shape[0])):
            torch.add(gates.keep(chunk, dstates[chunk + 1]), reads[chunk], out=dstates[chunk])
        before, after, dafter = states[:-1], states[1:], dstates[1:]
        dv = gates.writing(k) @ dafter
        add_products(dv.flatten(0, 2), inner.flatten(0, 2).mT, do.flatten(0, 2))
        dq, dk = gates.gram_adjoint(do @ v.mT, q, k)
        dq += gates.reading(do @ before.mT)
        dk += gates.writing(v @ dafter.mT)
        dlog = gates.log_grad([(q, dq)], [(k, dk)], after, dafter) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dlog, None, dstates[0], None


class DeltaChunks(torch.autograd.Function):
    """Rule delta: as `AddChunks`, with step sizes beta [C, B, G, L, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log: Tensor | None,
        beta: Tensor,
        state: Tensor,
        gates_of: type[Gates],
    ) -> tuple[Tensor, Tensor]:
        gates = gates_of(log)
        inner, keys = gates.gram(q, k), gates.gram(k, k)
        unit = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
        # The solver reads what is below the diagonal, and takes the diagonal for ones.
        inverse = torch.linalg.solve_triangular(beta * keys, unit, upper=False, unitriangular=True)
        states = state.new_empty(q.shape[0] + 1, *state.shape)
        states[0] = state
        x, u = torch.empty_like(v), torch.empty_like(v)
        # Batch and heads as one axis, for products that write where the result belongs.
        read, write = gates.reading(k).flatten(1, 2), gates.writing(k).flatten(1, 2)
        solve, flat = (inverse * beta.mT).flatten(1, 2), states.flatten(1, 2)
        v_, x_, u_ = v.flatten(1, 2), x.flatten(1, 2), u.flatten(1, 2)
        for chunk in range(q.shape[0]):
            torch.baddbmm(v_[chunk], read[chunk], flat[chunk], alpha=-1, out=x_[chunk])
            torch.bmm(solve[chunk], x_[chunk], out=u_[chunk])
            kept = gates.keep(chunk, states[chunk]).flatten(0, 1)
            torch.baddbmm(kept, write[chunk].mT, u_[chunk], out=flat[chunk + 1])
        o = gates.reading(q) @ states[:-1]
        add_products(o.flatten(0, 2), inner.flatten(0, 2), u.flatten(0, 2))
        ctx.save_for_backward(q, k, log, beta, inner, keys, inverse, x, u, states)
        ctx.gates_of = gates_of
        return o, states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> Gradients:
        q, k, log, beta, inner, keys, inverse, x, u, states = ctx.saved_tensors
        gates: Gates = ctx.gates_of(log)
        do = do.contiguous()
        dstates = torch.empty_like(states)
        dstates[-1] = dstate
        reads = gates.reading(q).mT @ do
        read, write = gates.reading(k).flatten(1, 2), gates.writing(k).flatten(1, 2)
        solve, dflat = inverse.flatten(1, 2), dstates.flatten(1, 2)
        # dbx is the gradient of beta X, dv that of X, which V enters unscaled.
        du, dbx, dv = inner.mT @ do, torch.empty_like(u), torch.empty_like(u)
        du_, dbx_, dv_ = du.flatten(1, 2), dbx.flatten(1, 2), dv.flatten(1, 2)
        for chunk in reversed(range(q.shape[0])):
            add_products(du_[chunk], write[chunk], dflat[chunk + 1])
            torch.bmm(solve[chunk].mT, du_[chunk], out=dbx_[chunk])
            torch.mul(beta[chunk], dbx[chunk], out=dv[chunk])
            torch.add(gates.keep(chunk, dstates[chunk + 1]), reads[chunk], out=dstates[chunk])
            add_products(dflat[chunk], read[chunk].mT, dv_[chunk], factor=-1)
        before, after, dafter = states[:-1], states[1:], dstates[1:]
        da = (dbx @ u.mT).neg_().tril_(-1)
        dbeta = (torch.linalg.vecdot(dbx, x) + torch.linalg.vecdot(da, keys))[..., None]
        dk_row, dk_column = gates.gram_adjoint(da.mul_(beta), k, k)
        dk_row -= gates.reading(dv @ before.mT)
        dq, dk_inner = gates.gram_adjoint(do @ u.mT, q, k)
        dq += gates.reading(do @ before.mT)
        dk_column += dk_inner
        dk_column += gates.writing(u @ dafter.mT)
        dlog = None
        if ctx.needs_input_grad[3]:
            dlog = gates.log_grad([(q, dq), (k, dk_row)], [(k, dk_column)], after, dafter)
        return dq, dk_row.add_(dk_column), dv, dlog, dbeta, dstates[0], None
