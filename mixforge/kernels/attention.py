"""Softmax attention o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over s <= t, and over s > t - W with a window W.

Queries are [B, H, T, K], keys [B, H', P + T, K] and values [B, H', P + T, V] with H' dividing H: the P keys at the left
are of tokens that came before the first query's. Outputs are [B, H, T, V].

`prefix_attention` is over s <= t or s < n: the first n tokens are read together, and later ones see no later token.
`masked_attention` takes which pairs are seen, or what is added to their scores, as a tensor.

Three forms: `reference` computes the weights of all pairs; `torch` is torch's own fused operation, over masked pairs or
in blocks for a window; `triton` (`attention_triton`) is the fused operation for every earlier token, and
FlexAttention for a window. A step of decoding is `step_attention` in all of them. How many pairs the torch form computes
is said by `attended_pairs`, which is what costs are made of.

Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Shazeer 2019 (arXiv 1911.02150) and Ainslie et al. 2023
(arXiv 2305.13245) for fewer key heads; Beltagy et al. 2020 (arXiv 2004.05150, section 3.1) for windows and their blocks;
Raffel et al. 2019 (arXiv 1910.10683, section 3.2.1) for prefixes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention_reference(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, start: int) -> Tensor:
    """Queries of the tokens from `start` on, over the keys of all tokens. Float32 or better inside."""
    return weigh_all_pairs(q_BHTK, k_BHTK, v_BHTK, k_BHTK.shape[2], start)


def window_attention_reference(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int, past: int
) -> Tensor:
    """Queries over the last `window` keys, their own included; `past` keys stand before the first query's."""
    return weigh_all_pairs(q_BHTK, k_BHTK, v_BHTK, window, past)


def weigh_all_pairs(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int, past: int) -> Tensor:
    """The weights of all pairs, as they stand in the equation."""
    check_attention(q_BHTK, k_BHTK, v_BHTK, window, past)
    dtype = torch.float64 if v_BHTK.dtype == torch.float64 else torch.float32
    group = q_BHTK.shape[1] // k_BHTK.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k_BHTK, v_BHTK))
    scores = q_BHTK.to(dtype) @ k.transpose(2, 3) / q_BHTK.shape[3] ** 0.5
    seen = window_pairs(q_BHTK.shape[2], window, past, q_BHTK.device)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(3)
    o_BHTK: Tensor = weights @ v
    return o_BHTK.to(v_BHTK.dtype)


def causal_attention_torch(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, start: int) -> Tensor:
    """As `causal_attention_reference`, by the fused operation.

    That has a kernel for values as wide as keys, and computes every weight for others: sequences without a past have
    the narrower ones widened with zeros. That takes more products and less time.
    """
    check_attention(q_BHTK, k_BHTK, v_BHTK, None, start)
    if start == 0:
        keys, values = q_BHTK.shape[3], v_BHTK.shape[3]
        q, k, v = equally_wide(q_BHTK, k_BHTK, v_BHTK)
        return attend(q, k, v, None, causal=True, scale=keys**-0.5)[..., :values]
    key = torch.arange(k_BHTK.shape[2], device=q_BHTK.device)
    return attend(q_BHTK, k_BHTK, v_BHTK, key <= key[start:, None])


def equally_wide(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, or values, filled up with zeros to the width of the others."""
    more = v_BHTV.shape[3] - q_BHTK.shape[3]
    if more > 0:
        return F.pad(q_BHTK, (0, more)), F.pad(k_BHTK, (0, more)), v_BHTV
    return q_BHTK, k_BHTK, F.pad(v_BHTV, (0, -more)) if more else v_BHTV


def prefix_attention_reference(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, prefix: int) -> Tensor:
    """Queries of a whole sequence over the keys of earlier tokens and of the first `prefix`. Float32 or better inside."""
    check_attention(q_BHTK, k_BHTK, v_BHTV, None, 0)
    key = torch.arange(k_BHTK.shape[2], device=q_BHTK.device)
    seen = (key <= key[:, None]) | (key < prefix)
    return masked_attention_reference(q_BHTK, k_BHTK, v_BHTV, seen, q_BHTK.shape[3] ** -0.5)


def prefix_attention_torch(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, prefix: int) -> Tensor:
    """As `prefix_attention_reference`, by the fused operation: of the prefix without a mask, then of what follows."""
    check_attention(q_BHTK, k_BHTK, v_BHTV, None, 0)
    length, scale, values = q_BHTK.shape[2], q_BHTK.shape[3] ** -0.5, v_BHTV.shape[3]
    q, k, v = equally_wide(q_BHTK, k_BHTK, v_BHTV)
    first = [x_BHTK[:, :, :prefix] for x_BHTK in (q, k, v)]
    o_BHTV = attend(first[0], first[1], first[2], None, scale=scale)
    if length > prefix:
        key = torch.arange(length, device=q.device)
        rest_BHTV = attend(q[:, :, prefix:], k, v, key <= key[prefix:, None], scale=scale)
        o_BHTV = torch.cat([o_BHTV, rest_BHTV], 2)
    return o_BHTV[..., :values]


def window_attention_torch(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int, past: int) -> Tensor:
    """As `window_attention_reference`, by the fused operation.

    All pairs with a mask for short sequences, and where there is a past; in blocks for those of 4 windows or more.
    """
    check_attention(q_BHTK, k_BHTK, v_BHTK, window, past)
    length = q_BHTK.shape[2]
    if past == 0 and length <= window:
        return attend(q_BHTK, k_BHTK, v_BHTK, None, causal=True)
    if past > 0 or length < 4 * window:
        return attend(q_BHTK, k_BHTK, v_BHTK, window_pairs(length, window, past, q_BHTK.device))
    q, k, v = (x_BHTK[:, :, :window] for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    first_BHTK = attend(q, k, v, None, causal=True)
    return torch.cat([first_BHTK, attend_in_blocks(q_BHTK, k_BHTK, v_BHTK, window)], 2)


def masked_attention_reference(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Over pairs of any kind. `mask` [..., T, S] is True where a query sees a key, or is added to its score.

    Scores are q . k times `scale`. Values may be wider or narrower than keys. Float32 or better inside.
    """
    dtype = torch.float64 if v_BHTK.dtype == torch.float64 else torch.float32
    group = q_BHTK.shape[1] // k_BHTK.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k_BHTK, v_BHTK))
    scores = q_BHTK.to(dtype) @ k.transpose(2, 3) * scale
    is_seen = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -torch.inf) if is_seen else scores + mask.to(dtype)
    o_BHTV: Tensor = scores.softmax(3) @ v
    return o_BHTV.to(v_BHTK.dtype)


def masked_attention_torch(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """As `masked_attention_reference`, by the fused operation."""
    return attend(q_BHTK, k_BHTK, v_BHTK, mask, scale=scale)


def attend(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The fused operation over as many or fewer key heads; `mask` is True where a query sees a key, or is added."""
    # A tracer hands out sizes as tensors, and the flag must be a plain one.
    grouped = bool(q_BHTK.shape[1] != k_BHTK.shape[1])
    return F.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attend_in_blocks(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int) -> Tensor:
    """From the second block of W queries on. Each sees the 2W keys of itself and of the block before."""
    batch, _, length, _ = q_BHTK.shape
    blocks = -(-length // window)
    padded = [F.pad(x_BHTK, (0, 0, 0, blocks * window - length)) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK)]
    # [B, C, H, W, K], and below the blocks folded into the batch.
    q, k, v = (torch.unflatten(x, 2, (blocks, window)).transpose(1, 2) for x in padded)
    k = torch.cat([k[:, :-1], k[:, 1:]], 3).flatten(0, 1)
    v = torch.cat([v[:, :-1], v[:, 1:]], 3).flatten(0, 1)
    o = attend(q[:, 1:].flatten(0, 1), k, v, window_pairs(window, window, window, q.device))
    o_BHTK = torch.unflatten(o, 0, (batch, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return o_BHTK[:, :, : length - window]


def step_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, positions_T: Tensor) -> Tensor:
    """One query over a cache whose slots are filled up to the query's position, or all of them."""
    slot = torch.arange(k_BHTK.shape[2], device=q_BHTK.device)
    return attend(q_BHTK, k_BHTK, v_BHTK, (slot <= positions_T)[None])


def window_pairs(length: int, window: int, past: int, device: torch.device) -> Tensor:
    """[T, P + T], True where a query sees a key."""
    key = torch.arange(past + length, device=device)
    query = key[past:, None]
    return (key <= query) & (key > query - window)


def check_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int | None, past: int) -> None:
    """Raise ValueError where the shapes do not fit."""
    if q_BHTK.dim() != 4 or q_BHTK.shape[2] == 0:
        raise ValueError(f"q must be of shape [B, H, T, K] with at least one token, got {list(q_BHTK.shape)}")
    batch, heads, length, dim = q_BHTK.shape
    for name, x_BHTK, last in (("k", k_BHTK, dim), ("v", v_BHTK, v_BHTK.shape[-1])):
        expected = (batch, k_BHTK.shape[1], past + length, last)
        if x_BHTK.dim() != 4 or x_BHTK.shape != expected:
            raise ValueError(
                f"{name} must be of shape {[batch, 'heads of k', past + length, last]} behind {past} earlier tokens and "
                f"beside q {list(q_BHTK.shape)}, got {list(x_BHTK.shape)}"
            )
    if heads % k_BHTK.shape[1] != 0:
        raise ValueError(f"{k_BHTK.shape[1]} key heads of k do not divide {heads} query heads of q")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def attended_pairs(length: int, window: int | None, prefix: int = 0) -> int:
    """Query-key pairs that the torch form computes for a sequence without a past, masked ones included."""
    if prefix:
        together = min(length, prefix)
        return together * together + (length - together) * length
    if window is None or length < 4 * window:
        return length * length
    blocks = -(-length // window)
    return window * window + (blocks - 1) * window * 2 * window


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "reference": causal_attention_reference,
    "torch": causal_attention_torch,
}
PREFIX_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "reference": prefix_attention_reference,
    "torch": prefix_attention_torch,
}
WINDOW_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, int, int], Tensor]] = {
    "reference": window_attention_reference,
    "torch": window_attention_torch,
}

MASKED_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "reference": masked_attention_reference,
    "torch": masked_attention_torch,
}


def form(backend: str) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Attention over all earlier tokens, of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[[Tensor, Tensor, Tensor, int], Tensor] = importlib.import_module(
            "mixforge.kernels.attention_triton"
        ).causal_attention_triton
        return found
    return FORMS[backend]


def prefix_form(backend: str) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Attention that sees a prefix as a whole, of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[[Tensor, Tensor, Tensor, int], Tensor] = importlib.import_module(
            "mixforge.kernels.attention_triton"
        ).prefix_attention_triton
        return found
    return PREFIX_FORMS[backend]


def window_form(backend: str) -> Callable[[Tensor, Tensor, Tensor, int, int], Tensor]:
    """Attention over a window, of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[[Tensor, Tensor, Tensor, int, int], Tensor] = importlib.import_module(
            "mixforge.kernels.attention_triton"
        ).window_attention_triton
        return found
    return WINDOW_FORMS[backend]


def masked_form(backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    """Attention over given pairs, of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = importlib.import_module(
            "mixforge.kernels.attention_triton"
        ).masked_attention_triton
        return found
    return MASKED_FORMS[backend]


def biased_form(backend: str) -> Callable[..., Tensor] | None:
    """Attention whose scores have terms of their own, without a matrix of them; None where there is no such form."""
    if backend != "triton":
        return None
    found: Callable[..., Tensor] = importlib.import_module(
        "mixforge.kernels.attention_triton"
    ).biased_attention_triton
    return found
