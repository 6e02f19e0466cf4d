"""Attention to keys that are quantised: its state is a count and a sum of values for each code of a codebook.

    z_s = argmin_c |k_s - C_c|^2,   k^_s = C_{z_s}
    o_t = sum_{s <= t} softmax_s(q_t . k^_s / sqrt(K)) v_s
        = sum_c n_tc e^(q_t . C_c / sqrt(K)) m_tc / sum_c n_tc e^(q_t . C_c / sqrt(K))

n_tc counts the tokens up to t of code c, and m_tc is the mean of their values; each head has C codes. Both lines are the
same attention, as tokens of one code have one weight. A sequence is read in blocks of C tokens: a token sees those of
its own block one by one, and all before them by their codes, so that work grows in proportion to the length.

With a bias b_{t-s} of distances below R, tokens of the own block and of the one before, which have R tokens or more, are
seen one by one, and the last R tokens are kept one by one beside the sums.

Gradients pass k^ as if it were k (straight through) where tokens are seen one by one, and stop at keys of earlier
blocks. In training the squared distance of keys and codes is added to the loss, as that of codes to keys that stand
still, and times 1e-4 as that of keys to codes that stand still.

Sources: Lingle 2023 (Transformer-VQ, arXiv 2309.16354) and its public code, for the codes, the blocks and the
coefficient; Liu et al. 2024 (LongVQ, arXiv 2404.11163), with a state space beside.

Departures: codes are weights, which descend on their distance to keys and, through the scores, on the loss of the
model, where the papers move them by running means of their keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_heads import Output, Queries
from mixforge.search_space.parts.attention_memory import KeysValues
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.routing import AttachLoss

# Of the distance that draws keys to their codes.
COMMITMENT = 1e-4


class CodeAttention(TokenMixer):
    """Heads with `codes` keys each, which start as normal numbers with a deviation of `spread`."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        codes: int,
        spread: float,
        queries: Queries,
        memory: KeysValues,
        output: Output,
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.queries = queries
        self.memory = memory
        self.codebook = nn.Parameter(torch.randn(heads, codes, head_dim) * spread)
        self.output = output

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        empty = no_codes(self.codebook, self.codebook.shape[2], batch, device, dtype)
        return {**empty, **self.memory.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        q_BHTK, k_BHTK, v_BHTV = self.read(x_BTD, state, at)
        o_BHTV, code_BHTK = over_codes(q_BHTK, k_BHTK, v_BHTV, self.codebook, state)
        y_BTD = self.output(o_BHTV.to(x_BTD.dtype), x_BTD)
        if state is None and self.training and torch.is_grad_enabled():
            y_BTD = AttachLoss.apply(y_BTD, apart(k_BHTK, code_BHTK))  # type: ignore[no-untyped-call]
        return y_BTD, state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        o_BHTV = over_codes_step(*self.read(x_BTD, state, at), self.codebook, state)
        return self.output(o_BHTV.to(x_BTD.dtype), x_BTD)[:, 0], state

    def read(self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, divided by sqrt(K), keys and values, in float32 or better."""
        entries = self.memory.entries(x_BTD, None, state, at)
        exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        q_BHTK: Tensor = self.queries(x_BTD, None, at.positions_T + 1, None)
        return q_BHTK.to(exact) * self.scale, entries["key"].to(exact), entries["value"].to(exact)


def no_codes(
    codebook: Tensor, channels: int, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Counts, and sums of values of so many channels, before the first token."""
    held = torch.float64 if dtype == torch.float64 else torch.float32
    heads, codes, _ = codebook.shape
    return {
        "count": torch.zeros(batch, heads, codes, device=device, dtype=held),
        "sum": torch.zeros(batch, heads, codes, channels, device=device, dtype=held),
    }


def over_codes(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, codebook: Tensor, state: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """A sequence: [B, H, T, V] of queries that are divided by sqrt(K), and the keys' codes.

    All are float32 or better. The state is brought up to date in place.
    """
    codes_HCK = codebook.to(q_BHTK.dtype)
    is_of_BHTC = nearest(k_BHTK, codes_HCK)
    code_BHTK = is_of_BHTC @ codes_HCK
    # The codes' values, with the gradient of the keys'.
    near_BHTK = code_BHTK + (k_BHTK - k_BHTK.detach())
    past = None if state is None else (state["count"], state["sum"])
    o_BHTV, count_BHC, sum_BHCV = by_blocks(q_BHTK, near_BHTK, v_BHTV, is_of_BHTC, codes_HCK, past)
    if state is not None:
        state["count"].copy_(count_BHC)
        state["sum"].copy_(sum_BHCV)
    return o_BHTV, code_BHTK


def over_codes_step(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, codebook: Tensor, state: dict[str, Tensor]
) -> Tensor:
    """As `over_codes`, of one token."""
    codes_HCK = codebook.to(q_BHTK.dtype)
    is_of_BHC1 = nearest(k_BHTK, codes_HCK).transpose(2, 3)
    state["count"].add_(is_of_BHC1[..., 0])
    state["sum"].add_(is_of_BHC1 * v_BHTV)
    scores_BHTC = q_BHTK @ codes_HCK.transpose(1, 2) + state["count"].log()[:, :, None]
    return scores_BHTC.softmax(3) @ mean_value(state["count"], state["sum"])


def nearest(k_BHTK: Tensor, codes_HCK: Tensor) -> Tensor:
    """[B, H, T, C], 1 at the code that is nearest to a key, the first of equally near ones."""
    apart_BHTC = codes_HCK.square().sum(2)[:, None] - 2 * k_BHTK @ codes_HCK.transpose(1, 2)
    code_C = torch.arange(codes_HCK.shape[1], device=k_BHTK.device)
    return (apart_BHTC.argmin(3, keepdim=True) == code_C).to(k_BHTK.dtype)


def apart(k_BHTK: Tensor, code_BHTK: Tensor) -> Tensor:
    """What training adds to the loss."""
    return distance(k_BHTK.detach(), code_BHTK) + COMMITMENT * distance(k_BHTK, code_BHTK.detach())


def distance(k_BHTK: Tensor, code_BHTK: Tensor) -> Tensor:
    """The squared distance, of all heads, as a mean over tokens."""
    return (k_BHTK - code_BHTK).square().sum((1, 3)).mean()


def by_blocks(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    is_of_BHTC: Tensor,
    codes_HCK: Tensor,
    past: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, H, T, V] after a past of counts and sums; both after the last token."""
    length = q_BHTK.shape[2]
    size = block_length(length, codes_HCK.shape[1])
    # Blocks are an axis before the heads. A token that pads the last one is of no code, and nobody sees it.
    q, k, v, is_of = (folded(x, size) for x in (q_BHTK, k_BHTK, v_BHTV, is_of_BHTC))
    count_BNHC = running(is_of.sum(3), None if past is None else past[0])
    sum_BNHCV = running(is_of.transpose(3, 4) @ v, None if past is None else past[1])
    before_BNHC = count_BNHC[:, :-1]
    # The logarithm of no token is -inf, which weighs nothing.
    far = q @ codes_HCK.transpose(1, 2) + before_BNHC.log()[..., None, :]
    place = torch.arange(size, device=q.device)
    near = (q @ k.transpose(3, 4)).masked_fill(place > place[:, None], -torch.inf)
    weights = torch.cat([far, near], 4).softmax(4)
    o = weights[..., : codes_HCK.shape[1]] @ mean_value(before_BNHC, sum_BNHCV[:, :-1])
    o = o + weights[..., codes_HCK.shape[1] :] @ v
    return o.transpose(1, 2).flatten(2, 3)[:, :, :length], count_BNHC[:, -1], sum_BNHCV[:, -1]


def by_blocks_with_bias(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    is_of_BHTC: Tensor,
    codes_HCK: Tensor,
    past: tuple[Tensor, Tensor] | None,
    reach: int,
    bias: Callable[[Tensor], Tensor],
) -> Tensor:
    """Outputs [B, H, T, V] after a past of tokens that are farther than the bias reaches from any of these."""
    length, codes = q_BHTK.shape[2], codes_HCK.shape[1]
    size = block_length(length, max(codes, reach))
    q, k, v, is_of = (folded(x, size) for x in (q_BHTK, k_BHTK, v_BHTV, is_of_BHTC))
    count_BNHC = before_last(running(is_of.sum(3), None if past is None else past[0]))
    sum_BNHCV = before_last(running(is_of.transpose(3, 4) @ v, None if past is None else past[1]))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], 3) for x in (k, v))
    far = q @ codes_HCK.transpose(1, 2) + count_BNHC.log()[..., None, :]
    place = torch.arange(2 * size, device=q.device)
    distance = place[size:, None] - place
    near = q @ k.transpose(3, 4) + bias(distance).to(q.dtype)
    # Before the first block there is none.
    first = torch.arange(q.shape[1], device=q.device)[:, None, None] == 0
    hidden = (distance < 0) | (first & (place < size))
    near = near.masked_fill(hidden[:, None], -torch.inf)
    weights = torch.cat([far, near], 4).softmax(4)
    o = weights[..., :codes] @ mean_value(count_BNHC, sum_BNHCV) + weights[..., codes:] @ v
    return o.transpose(1, 2).flatten(2, 3)[:, :, :length]


def before_last(sums: Tensor) -> Tensor:
    """[B, N, ...] of [B, N + 1, ...]: sums over the blocks before the one before each block."""
    return torch.cat([sums[:, :1], sums[:, :-2]], 1)


def block_length(length: int, codes: int) -> int:
    """As many tokens as codes, so that a query meets about as many of both; one block where there are fewer tokens."""
    return min(length, codes)


def folded(x_BHTK: Tensor, size: int) -> Tensor:
    """[B, N, H, L, K], the last block filled up with zeros."""
    padded = F.pad(x_BHTK, (0, 0, 0, -x_BHTK.shape[2] % size))
    return torch.unflatten(padded, 2, (-1, size)).transpose(1, 2)


def running(each: Tensor, past: Tensor | None) -> Tensor:
    """[B, N + 1, ...]: sums over the blocks before each block and over all."""
    first = torch.zeros_like(each[:, :1]) if past is None else past[:, None]
    return torch.cat([first, each], 1).cumsum(1)


def mean_value(count: Tensor, total: Tensor) -> Tensor:
    """Of each code; 0 for those of no token."""
    return total / count.clamp(min=1)[..., None]
