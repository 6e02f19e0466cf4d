"""Several states for each head, of which a token writes to and reads from a few, beside one that every token has.

    p = softmax(W x)        the k memories with the largest p are the token's
    top     every memory has keys, values and gates of its own; g_m = p_m over the sum of the chosen p (p_m for k = 1);
            o = o_0 + sum over the chosen m of g_m o_m: Du et al. 2025 (arXiv 2502.13685), section 3
    parts   one set of keys, values and gates for all memories but that of every token, its queries and keys those of
            the latter plus W_2 W_1 x; what is written and what is read are both weighed by p_m: Pan et al. 2025
            (arXiv 2507.16577), section 3, as in fla's layer

The state of a memory that is not a token's neither decays nor changes: its log decay is 0, and so is what is written
or, under the delta rule, how strongly. Memories are laid out as heads, memory 0 the one that every token has.

Departures: queries are projected once for all memories, as in fla. Convolutions read every token, where the code of
Du et al. reads a memory's own. Under the delta rule p_m weighs the write strength, so that keys keep their length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.routing import AttachLoss, Router

# Of the loss that keeps the load of the memories even, in training.
BALANCE_RATE = 0.01


class Memories(nn.Module):
    """Routing of [B, T, D] to `count` memories, and what it makes of what was read for H heads."""

    def __init__(self, width: int, count: int, top_k: int, is_shared: bool) -> None:
        super().__init__()
        self.count = count
        self.is_shared = is_shared
        self.router = Router(
            width=width,
            experts=count,
            top_k=top_k,
            score="softmax",
            renorm=top_k > 1 and not is_shared,
            scale=1.0,
            groups=None,
            balance="loss",
            rate=BALANCE_RATE,
            logit_bias=False,
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Weights [B, T, 1 + count], 0 for the memories that are not a token's."""
        weight_MA, index_MA, loss = self.router(x_BTD.flatten(0, 1))
        if loss is not None:
            weight_MA = AttachLoss.apply(weight_MA, loss)  # type: ignore[no-untyped-call]
        weight_ME = weight_MA.new_zeros(len(weight_MA), self.count).scatter(1, index_MA, weight_MA)
        weight_ME = torch.cat([torch.ones_like(weight_ME[:, :1]), weight_ME], 1)
        return weight_ME.view(*x_BTD.shape[:2], -1)

    def spread(self, x: Tensor, copies: int) -> Tensor:
        """[B, T, copies * H, *] -> [B, T, (1 + count) * H, *]: 1 copy for all, one for each, or 2 for first and rest."""
        if copies == 1 + self.count:
            return x
        parts = x.chunk(copies, 2)
        return torch.cat([parts[0], *[parts[-1]] * self.count], 2)

    def joined(self, o_BTHV: Tensor, weight_BTE: Tensor) -> Tensor:
        """[B, T, (1 + count) * H, V] -> [B, T, H, V], weighed and added up."""
        o_BTEHV = o_BTHV.view(*o_BTHV.shape[:2], 1 + self.count, -1, o_BTHV.shape[3])
        return (o_BTEHV * weight_BTE[..., None, None].to(o_BTHV.dtype)).sum(2)


class ApartKeys(nn.Module):
    """(q, k, v) side by side -> (q, q', k, k', v, v) with q' = q + W_2 W_1 x and k' as well."""

    def __init__(self, width: int, keys: int, rank: int) -> None:
        super().__init__()
        self.keys = keys
        self.q_down = Dense(width, rank, bias=False)
        self.q_up = Dense(rank, keys, bias=False)
        self.k_down = Dense(width, rank, bias=False)
        self.k_up = Dense(rank, keys, bias=False)

    def forward(self, mixed_BTF: Tensor, q_BTD: Tensor, k_BTD: Tensor) -> Tensor:
        q, k, v = mixed_BTF.tensor_split((self.keys, 2 * self.keys), -1)
        apart_q, apart_k = self.q_up(self.q_down(q_BTD)), self.k_up(self.k_down(k_BTD))
        return torch.cat([q, q + apart_q, k, k + apart_k, v, v], -1)
