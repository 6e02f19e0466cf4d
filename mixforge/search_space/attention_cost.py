"""What attention costs by the genes of `attn`: its weights, the products that it takes, the bytes that it keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mixforge.kernels.softmax_scan import scan_flops
from mixforge.search_space.genes import Form
from mixforge.search_space.mixer import Cost
from mixforge.search_space.parts.attention_blocks import block_pairs
from mixforge.search_space.parts.attention_codes import block_length
from mixforge.search_space.parts.attention_eviction import TAPS, evicting_slots, score_channels
from mixforge.search_space.parts.attention_pattern import block_size, fused_pairs
from mixforge.search_space.parts.attention_strides import boundary_slots, strided_pairs, strided_slots

if TYPE_CHECKING:
    from mixforge.search_space.mixers.attn import Attn

# Query heads, heads of keys and values, channels of a head.
Sizes = tuple[int, int, int]

# Bytes of a number that is kept in float32 in any case.
EXACT = 4
# Bytes of an angle that is the sum of the tokens' own.
ANGLE = 8
FREE = Cost(params=0, flops=0, state_bytes=0, decode_bytes=0)


def slots_of(gene: Attn, length: int) -> int:
    """Tokens that are kept of a sequence."""
    if gene.by_block is not None:
        return strided_slots(length, *gene.by_block)
    if gene.boundaries is not None:
        return boundary_slots(length, *gene.boundaries)
    if gene.evicts is not None:
        return evicting_slots(length, *gene.evicts)
    window, _ = gene.windows
    if isinstance(gene.score, Form):
        window = max(map(int, gene.score.arguments))
    return length if window is None else min(length, gene.first + (window - 1) * gene.dilation + 1)


def count_weights(gene: Attn, width: int, sizes: Sizes) -> tuple[int, int, int]:
    """Weights of the matrices that every token meets; of those that every entry meets when it is read; all others."""
    heads, kv_heads, head_dim = sizes
    seen, inner, channels = gene.seen(width), kv_heads * head_dim, heads * head_dim
    key_heads = gene.key_heads(kv_heads)
    keys_inner = key_heads * head_dim
    matrices, vectors = query_weights(gene, seen, sizes)
    reading = 0
    latent = gene.latent
    shifts = 0 if gene.kv_shift == "none" else kv_heads + key_heads
    biased = gene.bias != "none"
    if latent is not None:
        rank, rope_dim = latent
        matrices += seen * (rank + rope_dim)
        reading = rank * 2 * channels
        vectors += rank + gene.meta * (rank + rope_dim)
    elif gene.kv == "reuse":
        matrices += seen * (inner + shifts // 2)
        reading = head_dim * head_dim
        vectors += head_dim + (biased + gene.meta) * inner
    elif gene.kv != "shared":
        keys, key_bias = projection(gene, seen, keys_inner)
        matrices += keys + seen * (inner + shifts)
        if gene.special == "simplicial":
            # Pairs of tokens are of two keys and two values each.
            matrices += seen * 2 * inner
        vectors += biased * (key_bias + inner) + gene.meta * (keys_inner + inner)
    if gene.qk_norm != "none" and latent is None and gene.kv != "shared":
        vectors += {"rms": head_dim, "rms_all": keys_inner, "l2": 0}[gene.qk_norm]
    if isinstance(gene.experts, int):
        matrices += gene.experts * (head_dim * width + seen)
    else:
        matrices += channels * width
    if gene.out_gate == "sigmoid":
        matrices += seen * channels
    if gene.bias == "all":
        vectors += width
    # A differential layer has its norm.
    vectors += 6 * head_dim if gene.diff != "none" else head_dim if gene.out_norm == "rms" else 0
    if gene.norms_input:
        vectors += seen
    more, others = _position_weights(gene, width, sizes)
    matrices, vectors = matrices + more, vectors + others
    more, others = _score_weights(gene, seen, sizes)
    return matrices + more, reading, vectors + others


def _position_weights(gene: Attn, width: int, sizes: Sizes) -> tuple[int, int]:
    """Of matrices, and others, of what follows a token's place."""
    heads, kv_heads, head_dim = sizes
    turning = gene.turning_heads(kv_heads)
    matrices, vectors = 0, 0
    if gene.forget != "none":
        matrices, vectors = gene.seen(width) * heads, heads
    if gene.pos == "carope":
        matrices += gene.seen(width) * turning
    if gene.pos == "lrpe":
        vectors += turning * int(gene.turning(width)) // 2
    vectors += gene.distances * (head_dim + gene.value_dim(head_dim))
    return matrices, vectors


def _score_weights(gene: Attn, seen: int, sizes: Sizes) -> tuple[int, int]:
    """Of matrices, and others, of scores and of what is chosen by them."""
    heads, kv_heads, head_dim = sizes
    matrices, vectors = 0, 0
    if gene.sink == "learned":
        vectors += heads
    if gene.codes is not None:
        vectors += heads * gene.codes * head_dim
    if gene.evicts is not None:
        channels = score_channels(head_dim)
        matrices += kv_heads * (TAPS * sum(into * out for into, out in pairwise(channels)) + channels[-1])
        vectors += kv_heads * sum(channels[1:])
    if gene.special == "nsa":
        matrices += seen * 3 * heads
    if gene.special == "local_linear":
        vectors += heads
    if isinstance(gene.headmix, Form):
        rank = int(gene.headmix.arguments[0])
        hidden = 2 * heads * rank
        matrices += 4 * (seen * (hidden + heads) + hidden * 2 * rank * heads)
    elif gene.headmix == "static":
        vectors += 2 * heads * heads
    return matrices, vectors


def query_weights(gene: Attn, seen: int, sizes: Sizes) -> tuple[int, int]:
    """Of matrices, and others, that make queries."""
    heads, _, head_dim = sizes
    if gene.query == "learned":
        return 0, heads * head_dim
    channels = heads * gene.key_dim(head_dim)
    matrices, bias = projection(gene, seen, channels)
    vectors = 0 if gene.bias == "none" else bias
    if gene.qk_norm != "none":
        vectors += {"rms": head_dim, "rms_all": channels, "l2": heads}[gene.qk_norm]
    if isinstance(gene.experts, int):
        matrices = seen * gene.experts * head_dim
    if isinstance(gene.query_rank, int):
        matrices = gene.query_rank * (seen + channels)
        vectors += gene.query_rank
    return matrices, vectors + heads if gene.temper == "ssmax" else vectors


def projection(gene: Attn, seen: int, channels: int) -> tuple[int, int]:
    """Weights of the matrices, and the bias, that make queries or keys of two maps."""
    if not isinstance(gene.diff, Form):
        return seen * channels, channels
    rank = int(gene.diff.arguments[0])
    return seen * (channels // 2 + 2 * rank) + rank * channels, channels // 2


def score_flops(gene: Attn, length: int, sizes: Sizes) -> int:
    """Of queries times keys and of weights times values, masked pairs included, and of what changes them."""
    heads, _, head_dim = sizes
    if gene.query == "learned":
        return 2 * length * heads * head_dim + scan_flops(heads, length, head_dim)
    if gene.codes is not None:
        return 2 * heads * code_products(length, gene.codes, head_dim, head_dim)
    scores = gene.scores
    if scores == "special":
        return 2 * heads * special_products(gene, length, head_dim)
    window, _ = gene.windows
    keys, values = gene.key_dim(head_dim), gene.value_dim(head_dim)
    flops = 0
    if isinstance(gene.sparse, Form) and gene.sparse.name.startswith("block_"):
        flops = 2 * length * -(-length // int(gene.sparse.arguments[0])) * heads * head_dim
    if scores == "fused":
        by_block = gene.by_block
        pairs = (
            fused_pairs(length, window, gene.dilation, gene.first, gene.prefix)
            if by_block is None
            else strided_pairs(length, *by_block)
        )
        if window is None and gene.sparse == "none":
            # The narrower ones are widened (`causal_attention_torch`).
            keys = values = max(keys, values)
        return flops + 2 * pairs * heads * (keys + values)
    size = None if window is None else block_size(length, (window - 1) * gene.dilation + 1, gene.first)
    beside = gene.meta + (gene.sink == "learned" and scores == "biased")
    rows, pairs = block_pairs(length, size, beside)
    products = pairs * (keys + values)
    products += rows * gene.distances * (keys + values)
    if isinstance(gene.headmix, Form):
        # Before and after the weighing, by the query and by the key, into the rank and out of it.
        products += 8 * pairs * int(gene.headmix.arguments[0])
    elif gene.headmix == "static":
        products += 2 * pairs * heads
    return flops + 2 * heads * products


def code_products(length: int, codes: int, keys: int, values: int, reach: int = 0) -> int:
    """Multiply-adds of one head: keys and their codes, then in blocks sums of values, scores and outputs.

    With a bias of so many distances, a block also sees the one before token by token.
    """
    size = block_length(length, max(codes, reach))
    padded = -(-length // size) * size
    near = 2 * size if reach else size
    return 2 * length * codes * keys + padded * (codes * (keys + 2 * values) + near * (keys + values))


def special_products(gene: Attn, length: int, head_dim: int) -> int:
    """Multiply-adds of one head, masked pairs included, of scores that stand in the place of the usual ones."""
    if isinstance(gene.score, Form):
        first, second = map(int, gene.score.arguments)
        return length * first * second * 2 * head_dim
    if not isinstance(gene.sparse, Form):
        # Scores, first and second moments of the keys, the tilt, values.
        return length * length * (4 + head_dim) * head_dim
    block = int(gene.sparse.arguments[0])
    blocks = -(-length // block)
    if gene.special in ("landmark", "hsa"):
        return length * (2 * blocks * block + blocks * (gene.special == "hsa")) * head_dim
    return length * (length + blocks) * 2 * head_dim


def states_cost(gene: Attn, width: int, length: int, itemsize: int) -> Cost:
    """Of the state spaces that make keys and values, the last of their chunks being filled up."""
    if gene.filters is not None:
        channels = gene.sizes(width)[0] * gene.seen(width)
        numbers = channels * gene.filters
        return Cost(
            params=2 * numbers + 2 * channels,
            flops=2 * length * numbers,
            state_bytes=EXACT * numbers,
            decode_bytes=0,
        )
    if gene.chunk is None:
        return FREE
    heads, _, head_dim = gene.sizes(width)
    one = gene.states(width).cost(heads * head_dim, gene.chunk, itemsize)
    chunks = -(-length // gene.chunk)
    return Cost(
        params=2 * one.params,
        flops=2 * chunks * one.flops,
        state_bytes=2 * one.state_bytes,
        decode_bytes=2 * one.decode_bytes,
    )


def replaceable_slots(gene: Attn, length: int) -> int:
    """Slots beside a token's own that one more token may be written to: any one of those that eviction keeps."""
    if gene.evicts is None:
        return 0
    window, budget = gene.evicts
    return min(max(0, length + 1 - window), budget)


def state_bytes_of(gene: Attn, width: int, itemsize: int, sizes: Sizes) -> tuple[int, int]:
    """Bytes that are kept of each token, and bytes that are carried from token to token."""
    heads, kv_heads, head_dim = sizes
    inner, keys_inner = kv_heads * head_dim, gene.key_heads(kv_heads) * head_dim
    latent = gene.latent
    if latent is not None:
        entries = sum(latent)
    elif gene.kv == "shared":
        entries = 0
    else:
        entries = inner if gene.kv == "reuse" else keys_inner + inner
        entries *= 2 if gene.special == "simplicial" else 1
    if isinstance(gene.headmix, Form):
        entries += 2 * (2 * int(gene.headmix.arguments[0]) + 1) * heads
    carried = 0
    if gene.kv_shift != "none" and gene.kv != "shared":
        carried = (inner if gene.kv == "reuse" else keys_inner + inner) * itemsize
    if gene.pos == "carope":
        carried += gene.turning_heads(kv_heads) * int(gene.turning(width)) // 2 * ANGLE
    if gene.query == "learned":
        return 0, carried + heads * (head_dim + 2) * EXACT
    if gene.evicts is not None:
        taps = (TAPS - 1) * sum(score_channels(head_dim)[:-1])
        # Each slot has a score and a place.
        return entries * itemsize + 2 * kv_heads * EXACT, carried + kv_heads * taps * EXACT
    if gene.codes is not None:
        return 0, carried + heads * gene.codes * (head_dim + 1) * EXACT
    forgets = 0 if gene.forget == "none" else heads * EXACT
    return entries * itemsize + forgets, carried + forgets
