"""Softmax attention on a GPU: torch's fused operation over all earlier tokens, FlexAttention over a window.

FlexAttention compiles the mask and what is done to a score into torch's own Triton kernel, which leaves out blocks of
pairs that no query sees. The blocks are found by their bounds, never from a mask of all pairs. A forget gate and slopes
are added to each score where it is made (`biased_attention_triton`), so that no matrix of them is in memory. The gradient
of a forget gate is summed by atomics there, and may differ in its last bits from one run to the next.

Source: Dong et al. 2024 (arXiv 2412.05496) for FlexAttention; `attention` for the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mixforge.kernels.attention import (
    attend,
    causal_attention_torch,
    check_attention,
    masked_attention_torch,
    prefix_attention_torch,
)

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# Tokens of a block that is computed or left out as a whole.
BLOCK = 128
# What tl.dot takes at least.
SMALLEST_DIM = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch gives up on a function at its eighth kind of input; a search meets as many windows and heads in one process.
VARIANTS = 4096

compiled = torch.compile(flex_attention, fullgraph=True)


def biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left_BHT: Tensor | None,
    slope_H: Tensor | None,
    mask: BlockMask,
    scale: float,
    grouped: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and the logarithm of each softmax's sum [B, H, T]; compiled with what it adds to a score."""
    # FlexAttention has no gradient of a tensor that is read at two places.
    less_BHT = None if left_BHT is None else -left_BHT

    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if left_BHT is not None and less_BHT is not None:
            score = score + left_BHT[batch, head, query] + less_BHT[batch, head, key]
        if slope_H is not None:
            score = score + slope_H[head] * (query - key)
        return score

    o, extra = flex_attention(q, k, v, bias, mask, scale, grouped, return_aux=AuxRequest(lse=True))
    assert extra.lse is not None
    return o, extra.lse


compiled_biased = torch.compile(biased, fullgraph=True)


def causal_attention_triton(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, start: int) -> Tensor:
    """As `causal_attention_reference`, on a GPU. Raises ValueError elsewhere, and where shapes do not fit."""
    check_gpu(q_BHTK, k_BHTK, v_BHTK)
    return causal_attention_torch(q_BHTK, k_BHTK, v_BHTK, start)


def prefix_attention_triton(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, prefix: int) -> Tensor:
    """As `prefix_attention_reference`, on a GPU, by torch's fused operation. Raises ValueError elsewhere."""
    check_gpu(q_BHTK, k_BHTK, v_BHTV)
    return prefix_attention_torch(q_BHTK, k_BHTK, v_BHTV, prefix)


def window_attention_triton(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int, past: int) -> Tensor:
    """As `window_attention_reference`, on a GPU. Raises ValueError elsewhere, and where shapes or dtypes do not fit."""
    check_gpu(q_BHTK, k_BHTK, v_BHTK)
    check_dtype(q_BHTK, k_BHTK, v_BHTK)
    check_attention(q_BHTK, k_BHTK, v_BHTK, window, past)
    if past == 0 and q_BHTK.shape[2] <= window:
        return attend(q_BHTK, k_BHTK, v_BHTK, None, causal=True)
    return flexible_attention(q_BHTK, k_BHTK, v_BHTK, window, past)


def masked_attention_triton(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """As `masked_attention_reference`, on a GPU, by torch's fused operation. Raises ValueError elsewhere."""
    check_gpu(q_BHTK, k_BHTK, v_BHTK)
    return masked_attention_torch(q_BHTK, k_BHTK, v_BHTK, mask, scale)


def biased_attention_triton(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    window: int,
    left_BHT: Tensor | None,
    slope_H: Tensor | None,
    sink_H: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention over a window, with more in its scores, by FlexAttention on a GPU.

    To the score of query t and key s, q . k times `scale`, are added left_t - left_s, the running sums of a forget gate's
    logarithms, and slope (t - s). sink_H: a logit of each head with no value. Raises ValueError on other devices, and
    where shapes or dtypes do not fit.
    """
    check_gpu(q_BHTK, k_BHTK, v_BHTV)
    check_dtype(q_BHTK, k_BHTK, v_BHTV)
    check_attention(q_BHTK, k_BHTK, v_BHTV, window, 0)
    return biased_attention(q_BHTK, k_BHTK, v_BHTV, window, left_BHT, slope_H, sink_H, scale)


def biased_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    window: int,
    left_BHT: Tensor | None,
    slope_H: Tensor | None,
    sink_H: Tensor | None,
    scale: float,
) -> Tensor:
    """As `biased_attention_triton`, wherever FlexAttention runs."""
    q, k, v = (widened(x) for x in (q_BHTK, k_BHTK, v_BHTV))
    mask = block_mask(q.shape[2], window, q.device)
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        o, lse_BHT = biased(q, k, v, left_BHT, slope_H, mask, scale, grouped)
    else:
        with dynamo_config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
            o, lse_BHT = compiled_biased(q, k, v, left_BHT, slope_H, mask, scale, grouped)
    if sink_H is not None:
        # Of a softmax with one more entry, the share that falls on the others.
        share_BHT = torch.sigmoid(lse_BHT - sink_H[:, None].to(lse_BHT.dtype))
        o = o * share_BHT[..., None].to(o.dtype)
    return o[..., : v_BHTV.shape[3]]


def widened(x_BHTK: Tensor) -> Tensor:
    """With at least as many channels as a product of matrices takes."""
    return F.pad(x_BHTK, (0, max(0, SMALLEST_DIM - x_BHTK.shape[3])))


def flexible_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    window: int,
    past: int = 0,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """Attention over a window whose scores are changed by `score_mod(score, batch, head, query, key)`.

    A window as long as the keys is attention over all earlier tokens. Queries are counted as keys are: the first one of
    q has the number `past`. A score_mod is a function at the top level of a module, or one that is made once: each that
    is made anew is compiled anew.
    """
    dim = q_BHTK.shape[3]
    # Queries for the past, whose outputs are dropped, so that queries and keys are one sequence with one mask.
    q, k, v = F.pad(q_BHTK, (0, 0, past, 0)), k_BHTK, v_BHTK
    q, k, v = (widened(x_BHTK) for x_BHTK in (q, k, v))
    mask = block_mask(q.shape[2], window, q.device)
    o_BHTK = run(q, k, v, score_mod, mask, dim**-0.5, q.shape[1] != k.shape[1])
    return o_BHTK[:, :, past:, : v_BHTK.shape[3]]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: ScoreMod | None,
    mask: BlockMask,
    scale: float,
    grouped: bool,
) -> Tensor:
    """The compiled operation, or the plain one inside of what torch compiles already."""
    if torch.compiler.is_compiling():
        found: Tensor = flex_attention(q, k, v, score_mod, mask, scale, grouped)
        return found
    with dynamo_config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
        o: Tensor = compiled(q, k, v, score_mod, mask, scale, grouped)
    return o


def window_mask(window: int, device: torch.device) -> Mask:
    """mask(batch, head, query, key): whether the query sees the key."""
    # In a tensor, for a number that changes is compiled anew, and has crashed torch's compiler (pytorch issue 157833).
    bound = torch.tensor(window, dtype=torch.int32, device=device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - bound)

    return mask


@lru_cache(maxsize=64)
def block_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """The mask of a window, with the blocks of pairs that are seen wholly or in part."""
    # Kept beyond the call, so not as tensors of inference mode, which training may not save.
    with torch.inference_mode(False):
        return made_mask(length, window, device)


def made_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """The mask anew."""
    first = torch.arange(0, length, BLOCK, device=device)
    last = first + BLOCK - 1
    begin, end = first[:, None], last[:, None]
    seen = (first <= end) & (last > begin - window)
    # A block at the end is counted as if the sequence filled it, and so is whole only where it is full.
    whole = (last <= begin) & (first > end - window) & (end < length)
    partial = seen & ~whole
    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(whole), BLOCK, window_mask(window, device), seq_lengths=(length, length)
    )


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many are marked [1, 1, C], and all numbers, those of marked ones first [1, 1, C, C]."""
    numbers = torch.argsort(blocks.to(torch.int32), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None].contiguous()


def check_gpu(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> None:
    """Raise ValueError where a tensor is not on a GPU: nothing here runs under Triton's interpreter."""
    for name, x_BHTK in (("q", q_BHTK), ("k", k_BHTK), ("v", v_BHTK)):
        if x_BHTK.device.type != "cuda":
            raise ValueError(
                f"{name} is on {x_BHTK.device}, and attention with backend='triton' runs on a GPU: move model and inputs "
                "with .to('cuda'), or build with backend='torch'"
            )


def check_dtype(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> None:
    """Raise ValueError where FlexAttention has no kernel."""
    for name, x_BHTK in (("q", q_BHTK), ("k", k_BHTK), ("v", v_BHTK)):
        if x_BHTK.dtype not in DTYPES or x_BHTK.dtype != q_BHTK.dtype:
            raise ValueError(
                f"{name} is {x_BHTK.dtype}; backend='triton' takes float32, bfloat16 or float16, one for q, k and v"
            )
