"""Which genes of `attn` do not go together, and what to say instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mixforge.search_space.genes import Form, GeneValue, genes_of
from mixforge.search_space.heads import undivided

if TYPE_CHECKING:
    from mixforge.search_space.mixers.attn import Attn

# What genes must be where tokens are evicted.
_EVICTION_NEEDS: Mapping[str, GeneValue] = {
    "mask": "causal",
    "source": "token",
    "dilation": 1,
    "meta": 0,
    "score": "softmax",
    "forget": "none",
    "diff": "none",
    "headmix": "none",
    "experts": "none",
}
# And where keys are read by a state and not from a cache.
_STATE_NEEDS: Mapping[str, GeneValue] = {
    "sparse": "none",
    "pos": "none",
    "window": "none",
    "sink": "none",
    **_EVICTION_NEEDS,
}
# And where one learned query scans keys and values.
_SCAN_NEEDS: Mapping[str, GeneValue] = {
    **_STATE_NEEDS,
    "query_rank": "none",
    "qk_norm": "none",
    "temper": "none",
}
# What genes must be where heads are experts.
_EXPERTS_NEED: Mapping[str, GeneValue] = {
    "query_rank": "none",
    "bias": "none",
    "temper": "none",
    "forget": "none",
    "diff": "none",
    "headmix": "none",
    "sink": "none",
}


def why_unfit(gene: Attn, width: int) -> str | None:
    """A sentence on the first genes that do not go together; None where all do."""
    heads, kv_heads, head_dim = gene.sizes(width)
    if gene.head_dim is None and width % heads != 0:
        return undivided("attn", heads, width)
    if heads % kv_heads != 0:
        return f"{kv_heads} key/value heads do not divide {heads} query heads (mixer attn)"
    if gene.reads != "stream" and gene.source != "token":
        return (
            f"reads={gene.reads} is as wide as two streams, and source={gene.source} as one (mixer attn); "
            "use source=token"
        )
    if gene.chunk is not None and (gene.kv_shift != "none" or gene.special == "simplicial"):
        given = f"score={gene.score}" if gene.special == "simplicial" else f"kv_shift={gene.kv_shift}"
        return (
            f"kv={gene.kv} says how keys and values are made, so it takes no {given} (mixer attn); use kv=mha"
        )
    if gene.filters is not None:
        reason = _why_no_filters(gene, gene.filters)
        if reason is not None:
            return reason
    if gene.kv == "ska" and (isinstance(gene.diff, Form) or gene.special == "simplicial"):
        given = f"diff={gene.diff}" if isinstance(gene.diff, Form) else f"score={gene.score}"
        return (
            f"kv=ska has one head of keys, so it takes no {given}, which pairs them (mixer attn); use kv=mha"
        )
    if gene.query == "learned":
        return _why_no_scan(gene)
    if gene.codes is not None:
        return _why_no_codes(gene)
    if gene.prefix:
        reason = _why_no_prefix(gene)
        if reason is not None:
            return reason
    turning = gene.turning(width) if gene.turns else 2
    if turning != int(turning) or turning % 2 != 0 or turning == 0:
        given = f"rope_dim {turning}" if gene.latent else f"{turning:g} channels of head_dim {head_dim}"
        return (
            f"pos={gene.pos} turns pairs of channels, and {given} are no pairs (mixer attn); "
            f"say an even {'rope_dim' if gene.latent else 'head_dim, or another rotary'}, or pos=none"
        )
    longer, shorter = gene.windows
    if shorter is not None and longer is not None and shorter > longer:
        return f"window={gene.window} names the longer window first (mixer attn); write the shorter one first"
    if gene.dilation > 1 and longer is None:
        return f"dilation={gene.dilation} is of a window, and there is none (mixer attn); say window"
    if isinstance(gene.experts, int):
        return (
            _why_no_experts(gene, heads, kv_heads, gene.experts)
            or _why_no_cache(gene)
            or _why_no_sparse(gene)
        )
    return (
        _why_no_cache(gene)
        or _why_no_latent(gene)
        or _why_no_scores(gene, heads, kv_heads)
        or _why_no_sparse(gene)
    )


def _why_no_filters(gene: Attn, numbers: int) -> str | None:
    if numbers % 2 != 0:
        return f"kv={gene.kv} is no number of conjugate pairs (mixer attn); say an even one"
    refused = {
        "kv_shift": gene.kv_shift != "none",
        "bias": gene.bias != "none",
        "diff": isinstance(gene.diff, Form),
        "score": gene.special == "simplicial",
    }
    given = next((f"{name}={getattr(gene, name)}" for name, is_given in refused.items() if is_given), None)
    if given is None:
        return None
    return f"kv={gene.kv} says how keys and values are made, so it takes no {given} (mixer attn); use kv=mha"


def _why_no_prefix(gene: Attn) -> str | None:
    """What attention that sees a prefix as a whole cannot do."""
    for name in ("window", "sparse"):
        if getattr(gene, name) != "none":
            return (
                f"mask={gene.mask} is of attention to every token, so it takes no {name}={getattr(gene, name)} "
                "(mixer attn); leave one out"
            )
    if gene.special is not None:
        return f"score={gene.score} is of earlier tokens, so it takes no mask={gene.mask} (mixer attn); leave one out"
    if gene.forget != "none":
        return (
            f"forget={gene.forget} is what is left of an earlier token, and mask={gene.mask} sees later ones "
            "(mixer attn); leave one out"
        )
    if gene.pos in ("xpos", "alibi", "alibi_rope"):
        return (
            f"pos={gene.pos} grades earlier tokens by their distance, and mask={gene.mask} sees later ones (mixer attn); "
            "use rope, relative(n) or none"
        )
    return None


def _why_no_experts(gene: Attn, heads: int, kv_heads: int, experts: int) -> str | None:
    if heads > experts:
        return f"each token takes heads={heads} of experts={experts} (mixer attn); say fewer heads or more experts"
    if kv_heads != 1 or gene.latent is not None:
        return (
            f"experts={experts} share one head of keys and values, not kv={gene.kv} (mixer attn); use kv=mqa"
        )
    for name, plain in _EXPERTS_NEED.items():
        if getattr(gene, name) != plain:
            return (
                f"experts={experts} stand in any head's place, so they take no {name}={getattr(gene, name)}, "
                f"which is of one head (mixer attn); leave {name} at {plain}"
            )
    if gene.pos in ("alibi", "alibi_rope") or gene.qk_norm in ("l2", "rms_all"):
        given = f"pos={gene.pos}" if gene.pos in ("alibi", "alibi_rope") else f"qk_norm={gene.qk_norm}"
        return f"experts={experts} stand in any head's place, and {given} differs by head (mixer attn)"
    return _why_no_scores(gene, heads, kv_heads)


def _why_no_scan(gene: Attn) -> str | None:
    if gene.kv in ("own", "shared", "reuse", "ska") or gene.latent is not None or gene.codes is not None:
        return f"query=learned keeps no cache, so it takes no kv={gene.kv} (mixer attn); use mha, mqa or gqa"
    for name, plain in _SCAN_NEEDS.items():
        if getattr(gene, name) != plain:
            return (
                "query=learned is a scan of one query over keys and values, so it takes no "
                f"{name}={getattr(gene, name)} (mixer attn); leave {name} at {plain}"
            )
    return None


def _why_no_codes(gene: Attn) -> str | None:
    for name, plain in _STATE_NEEDS.items():
        if getattr(gene, name) != plain:
            return (
                f"kv={gene.kv} sees all tokens by the codes of their keys, so it takes no "
                f"{name}={getattr(gene, name)} (mixer attn); say {name}={plain}"
            )
    return None


def _why_no_eviction(gene: Attn) -> str | None:
    if gene.kv in ("reuse", "ska") or (isinstance(gene.kv, Form) and gene.kv.name != "gqa"):
        return f"sparse={gene.sparse} scores keys and values, so it takes no kv={gene.kv} (mixer attn); use mha or gqa"
    for name, plain in _EVICTION_NEEDS.items():
        if getattr(gene, name) != plain:
            return (
                f"sparse={gene.sparse} keeps tokens of its own for each head of keys, so it takes no "
                f"{name}={getattr(gene, name)} (mixer attn); leave {name} at {plain}"
            )
    if gene.sink == "learned":
        return f"sparse={gene.sparse} takes no sink=learned (mixer attn); use sink=tokens(n) or none"
    if gene.evicts is not None and gene.first > gene.evicts[1]:
        return f"sparse={gene.sparse} keeps {gene.evicts[1]} tokens, and sink={gene.sink} is more (mixer attn); say fewer"
    if gene.pos not in ("rope", "none", "lrpe", "carope"):
        return (
            f"sparse={gene.sparse} knows no distances, so it takes no pos={gene.pos} (mixer attn); use rope"
        )
    return None


def _why_no_cache(gene: Attn) -> str | None:
    """What a cache that layers share cannot do."""
    if gene.kv not in ("own", "shared"):
        if gene.kv == "reuse" and gene.pos == "carope":
            return (
                "kv=reuse turns keys when they are read, where pos=carope has no angle (mixer attn); use rope"
            )
        return None
    if gene.source != "token":
        return f"kv={gene.kv} is a cache of tokens for many layers, so it takes no source={gene.source} (mixer attn)"
    if gene.window != "none":
        return f"kv={gene.kv} is a cache of every token, so it takes no window (mixer attn)"
    if gene.pos in ("lrpe", "carope"):
        return (
            f"kv={gene.kv} needs the same turn in every layer, and pos={gene.pos} learns its own (mixer attn)"
        )
    if gene.kv == "shared" and gene.meta > 0:
        return f"kv=shared has no keys and values of its own, so no meta={gene.meta} (mixer attn); say it at kv=own"
    return None


def _why_no_latent(gene: Attn) -> str | None:
    """What keys and values that are only made of latents cannot do."""
    if gene.latent is None:
        return None
    for name in ("qk_norm", "bias", "kv_shift", "diff"):
        if getattr(gene, name) != "none":
            return (
                f"kv={gene.kv} decodes from latents without making keys and values, so it takes no "
                f"{name}={getattr(gene, name)} (mixer attn)"
            )
    if gene.clip is not None:
        return f"kv={gene.kv} decodes without keys of its heads, so it takes no pos={gene.pos} (mixer attn)"
    return None


def _why_no_scores(gene: Attn, heads: int, kv_heads: int) -> str | None:
    if gene.sink == "learned" and gene.score != "softmax":
        return f"score={gene.score} has no denominator for sink=learned (mixer attn); use score=softmax"
    placeless = gene.pos == "xpos" or gene.clip is not None
    if gene.meta > 0 and (placeless or isinstance(gene.headmix, Form)):
        given = f"pos={gene.pos}" if placeless else f"headmix={gene.headmix}"
        return f"{given} needs a token's place or input, and meta={gene.meta} tokens have none (mixer attn)"
    if gene.headmix != "none" and heads == 1:
        return f"headmix={gene.headmix} mixes heads, and there is one (mixer attn); say more heads"
    if gene.diff != "none" and (heads % 2 != 0 or kv_heads % 2 != 0):
        return f"diff={gene.diff} pairs heads, and {heads} with {kv_heads} of keys and values are odd (mixer attn)"
    if isinstance(gene.diff, Form) and gene.query_rank != "none":
        return f"diff={gene.diff} says how queries are made, so it takes no query_rank={gene.query_rank} (mixer attn)"
    return None


def _why_no_sparse(gene: Attn) -> str | None:
    """What a sparse pattern, and what stands in the place of the usual scores, cannot do."""
    if gene.sparse == "none" and gene.score == "softmax":
        return None
    if gene.sparse != "none" and (gene.window != "none" or gene.kv in ("own", "shared")):
        beside = f"window={gene.window}" if gene.window != "none" else f"kv={gene.kv}"
        return f"sparse={gene.sparse} says who sees whom, so it takes no {beside} (mixer attn); leave one out"
    if gene.evicts is not None:
        return _why_no_eviction(gene)
    if gene.by_block is not None and gene.by_block[1] >= gene.by_block[0]:
        return f"sparse={gene.sparse} keeps every token of a block (mixer attn); keep less than {gene.by_block[0]}"
    chooses = isinstance(gene.sparse, Form) and gene.sparse.name.startswith("block_")
    if gene.special is None and not chooses:
        return None
    given = f"score={gene.score}" if gene.score != "softmax" else f"sparse={gene.sparse}"
    if gene.special in ("local_linear", "simplicial") and gene.sparse != "none":
        return f"{given} weighs all tokens, so it takes no sparse={gene.sparse} (mixer attn); leave one out"
    plain = ("diff", "headmix", "forget", "sink", "meta", "experts", *(("score",) if chooses else ()))
    plain += ("qk_norm", "bias", "kv_shift", "window") if gene.special == "simplicial" else ()
    for name in plain:
        if getattr(gene, name) != genes_of(type(gene))[name].default:
            return f"{given} takes no {name}={getattr(gene, name)} (mixer attn); leave {name} out"
    if gene.kv == "reuse" or gene.kv in ("own", "shared") or gene.latent is not None:
        return f"{given} needs keys and values of its own, so it takes no kv={gene.kv} (mixer attn); use mha or gqa"
    if gene.special == "simplicial" and gene.pos != "none":
        return f"{given} is over products of keys, which no position turns (mixer attn); use pos=none"
    if gene.special == "local_linear" and gene.pos == "xpos":
        return f"{given} takes keys from queries, which pos=xpos scales apart (mixer attn); use pos=rope"
    if gene.clip is not None or gene.pos in ("alibi", "alibi_rope"):
        return f"{given} takes no terms of a distance such as pos={gene.pos} (mixer attn); use rope or none"
    return None
