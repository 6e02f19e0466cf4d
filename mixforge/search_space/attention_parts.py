"""The parts that the genes of `attn` name: queries, memory, position, pattern, scores and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixforge.kernels import attention, diagonal_ssm, softmax_scan
from mixforge.search_space.genes import Form
from mixforge.search_space.mixer import Backend
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attention_choice import BestBlocks, LikelyBlocks
from mixforge.search_space.parts.attention_codes import CodeAttention
from mixforge.search_space.parts.attention_eviction import EvictingAttention, TokenScores
from mixforge.search_space.parts.attention_experts import ExpertOutputs, ExpertQueries, Routing
from mixforge.search_space.parts.attention_filters import FilteredKeysValues
from mixforge.search_space.parts.attention_grouped import Grouped
from mixforge.search_space.parts.attention_heads import (
    Differential,
    GrowingBase,
    LowRank,
    Output,
    Queries,
    ScaledUnit,
    TwoMaps,
    Unit,
)
from mixforge.search_space.parts.attention_local_linear import LocalLinear
from mixforge.search_space.parts.attention_memory import Borrowed, KeysValues, Latents, ReusedKeys, TokenShift
from mixforge.search_space.parts.attention_mix import DynamicMix, StaticMix
from mixforge.search_space.parts.attention_pattern import EveryToken, EveryTokenAndPrefix, Window
from mixforge.search_space.parts.attention_position import ContextRotary, LearnedRotary, Nowhere, Rotary
from mixforge.search_space.parts.attention_scan import LearnedQuery
from mixforge.search_space.parts.attention_scores import Biased, Fused, Relative, Scored, Slopes, Terms, Weigh
from mixforge.search_space.parts.attention_simplicial import Simplicial, TwoKeysValues
from mixforge.search_space.parts.attention_states import ByChunk, ChunkStates
from mixforge.search_space.parts.attention_strides import Blocks, Boundaries, Strided
from mixforge.search_space.parts.attention_summaries import NativeSparse, Summarised
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.routing import Router
from mixforge.search_space.parts.state_space import DiagonalScan

if TYPE_CHECKING:
    from mixforge.search_space.mixers.attn import Attn

# What balances the load of experts that are heads: the rate of arXiv 2101.03961.
BALANCE = 0.01


def stateful_part(gene: Attn, width: int, backend: Backend) -> Part | None:
    """The whole module where what it keeps is no cache of a pattern's tokens; None where it is."""
    if gene.query == "token" and gene.codes is None and gene.evicts is None:
        return None
    heads, kv_heads, head_dim = gene.sizes(width)
    memory, output = memory_part(gene, width, backend), output_part(gene, width, backend)
    if gene.query == "learned":
        return Part(
            LearnedQuery,
            heads=heads,
            head_dim=head_dim,
            memory=memory,
            output=output,
            operation=softmax_scan.form(backend),
            one_step=softmax_scan.step_form(backend),
        )
    queries = queries_part(gene, width, backend)
    if gene.codes is not None:
        # As far from zero as norms leave keys, or as projections start.
        usual = {"rms": 1.0, "rms_all": 1.0, "l2": head_dim**-0.5}
        return Part(
            CodeAttention,
            heads=heads,
            head_dim=head_dim,
            codes=gene.codes,
            spread=usual.get(gene.qk_norm, 3**-0.5),
            queries=queries,
            memory=memory,
            output=output,
        )
    assert gene.evicts is not None
    window, budget = gene.evicts
    return Part(
        EvictingAttention,
        window=window,
        budget=budget,
        sinks=gene.first,
        queries=queries,
        memory=memory,
        position=position_part(gene, width),
        scores=Part(TokenScores, heads=kv_heads, head_dim=head_dim),
        output=output,
        masked=attention.masked_form(backend),
    )


def routing_part(gene: Attn, width: int) -> Part | None:
    if not isinstance(gene.experts, int):
        return None
    router = Part(
        Router,
        width=gene.seen(width),
        experts=gene.experts,
        top_k=gene.sizes(width)[0],
        score="softmax",
        renorm=True,
        scale=1.0,
        groups=None,
        balance="loss",
        rate=BALANCE,
        logit_bias=False,
    )
    return Part(Routing, router=router)


def queries_part(gene: Attn, width: int, backend: Backend) -> Part:
    heads, _, head_dim = gene.sizes(width)
    channels = heads * gene.key_dim(head_dim)
    seen = gene.seen(width)
    query = linear_part(gene, seen, channels)
    if isinstance(gene.experts, int):
        query = Part(ExpertQueries, width=seen, experts=gene.experts, head_dim=head_dim)
    if isinstance(gene.query_rank, int):
        query = Part(
            LowRank,
            width=seen,
            rank=gene.query_rank,
            channels=channels,
            bias=gene.bias != "none",
            norm=norm_part(gene.query_rank, backend),
        )
    norm = (
        Part(ScaledUnit, heads=heads) if gene.qk_norm == "l2" else qk_norm_part(gene, width, heads, backend)
    )
    return Part(
        Queries,
        heads=heads,
        query=query,
        query_norm=norm,
        whole=gene.qk_norm == "rms_all",
        temper=Part(GrowingBase, heads=heads) if gene.temper == "ssmax" else None,
    )


def linear_part(gene: Attn, seen: int, channels: int) -> Part:
    """What makes queries or keys of the input."""
    biased = gene.bias != "none"
    if isinstance(gene.diff, Form):
        rank = int(gene.diff.arguments[0])
        return Part(TwoMaps, width=seen, rank=rank, channels=channels // 2, bias=biased)
    return Part(Dense, in_features=seen, out_features=channels, bias=biased)


def qk_norm_part(gene: Attn, width: int, heads: int, backend: Backend) -> Part | None:
    """Of queries or keys of so many heads."""
    head_dim = gene.sizes(width)[2]
    if gene.qk_norm in ("rms", "rms_all"):
        return norm_part(head_dim * (heads if gene.qk_norm == "rms_all" else 1), backend)
    return Part(Unit) if gene.qk_norm == "l2" else None


def memory_part(gene: Attn, width: int, backend: Backend) -> Part:
    heads, kv_heads, head_dim = gene.sizes(width)
    seen = gene.seen(width)
    if gene.kv == "shared":
        return Part(Borrowed)
    if gene.latent is not None:
        rank, rope_dim = gene.latent
        norm = norm_part(rank, backend)
        return Part(
            Latents, width=seen, heads=heads, head_dim=head_dim, rank=rank, rope_dim=rope_dim, norm=norm
        )
    if gene.special == "simplicial":
        return Part(TwoKeysValues, width=seen, heads=kv_heads, head_dim=head_dim)
    key_heads = gene.key_heads(kv_heads)
    shift, key_shift = (
        Part(TokenShift, width=seen, heads=each) if gene.kv_shift == "token" else None
        for each in (kv_heads, key_heads)
    )
    key = linear_part(gene, seen, key_heads * head_dim)
    key_norm = qk_norm_part(gene, width, key_heads, backend)
    if gene.filters is not None:
        forms = {"operation": diagonal_ssm.form(backend), "one_step": diagonal_ssm.step_form(backend)}
        given = {"states": gene.filters, "is_complex": True, **forms}
        return Part(
            FilteredKeysValues,
            heads=heads,
            head_dim=head_dim,
            width=seen,
            scan=Part(DiagonalScan, channels=heads * seen, **given),
            key_norm=key_norm,
            whole=gene.qk_norm == "rms_all",
        )
    if gene.kv == "reuse":
        return Part(ReusedKeys, head_dim=head_dim, key=key, key_norm=key_norm, key_shift=shift)
    value = Part(Dense, in_features=seen, out_features=kv_heads * head_dim, bias=gene.bias != "none")
    if gene.chunk is not None:
        states = Part(ByChunk, mixer=gene.states(width).build(heads * head_dim, backend), chunk=gene.chunk)
        return Part(
            ChunkStates,
            heads=heads,
            head_dim=head_dim,
            key=key,
            value=value,
            key_norm=key_norm,
            whole=gene.qk_norm == "rms_all",
            key_states=states,
            value_states=states,
        )
    return Part(
        KeysValues,
        heads=kv_heads,
        key_heads=key_heads,
        head_dim=head_dim,
        key=key,
        value=value,
        key_norm=key_norm,
        whole=gene.qk_norm == "rms_all",
        key_shift=key_shift,
        value_shift=shift,
        publishes=gene.kv == "own",
    )


def position_part(gene: Attn, width: int) -> Part:
    if not gene.turns:
        return Part(Nowhere)
    channels = int(gene.turning(width))
    heads = gene.turning_heads(gene.sizes(width)[1])
    if gene.pos == "lrpe":
        return Part(LearnedRotary, channels=channels, heads=heads, theta=gene.theta)
    if gene.pos == "carope":
        return Part(ContextRotary, width=gene.seen(width), channels=channels, heads=heads)
    return Part(Rotary, channels=channels, theta=gene.theta, scales=gene.pos == "xpos")


def pattern_part(gene: Attn, backend: Backend) -> Part:
    window, shorter = gene.windows
    masked = attention.masked_form(backend)
    if isinstance(gene.score, Form):
        window = max(map(int, gene.score.arguments))
    if gene.by_block is not None:
        block, kept = gene.by_block
        return Part(Blocks, block=block, kept=kept, masked=masked)
    if gene.boundaries is not None:
        block, leading = gene.boundaries
        return Part(Boundaries, block=block, leading=leading, masked=masked)
    if isinstance(gene.sparse, Form) and gene.special is None:
        block, other = int(gene.sparse.arguments[0]), gene.sparse.arguments[-1]
        if gene.sparse.name == "strided":
            return Part(Strided, stride=block, masked=masked)
        if gene.sparse.name == "block_topk":
            return Part(BestBlocks, block=block, others=int(other) - 1, masked=masked)
        return Part(LikelyBlocks, block=block, share=float(other), masked=masked)
    later = attention.form(backend)
    if gene.prefix:
        together = attention.prefix_form(backend)
        return Part(EveryTokenAndPrefix, length=gene.prefix, operation=together, later=later)
    if window is None:
        return Part(EveryToken, operation=later)
    return Part(
        Window,
        window=window,
        dilation=gene.dilation,
        first=gene.first,
        shorter=shorter,
        operation=attention.window_form(backend),
        masked=masked,
    )


def scores_part(gene: Attn, width: int, backend: Backend) -> Part:
    heads, _, head_dim = gene.sizes(width)
    scale = gene.key_dim(head_dim) ** -0.5
    if gene.scores == "fused":
        return Part(Fused, scale=scale)
    if gene.scores == "special":
        return special_scores_part(gene, width, scale)
    slopes = (
        Part(Slopes, heads=heads, balanced=gene.pos == "alibi_rope")
        if gene.pos in ("alibi", "alibi_rope")
        else None
    )
    terms = Part(Terms, forgets=gene.forget == "head", slopes=slopes)
    sinks = heads if gene.sink == "learned" else 0
    if gene.scores == "biased":
        flexible = attention.biased_form(backend)
        given = {} if flexible is None else {"flexible": flexible}
        operation = attention.masked_form(backend)
        return Part(Biased, scale=scale, terms=terms, sinks=sinks, operation=operation, **given)
    mix: Part | None = None
    if isinstance(gene.headmix, Form):
        mix = Part(DynamicMix, width=gene.seen(width), heads=heads, rank=int(gene.headmix.arguments[0]))
    elif gene.headmix == "static":
        mix = Part(StaticMix, heads=heads)
    dims = {"key_dim": gene.key_dim(head_dim), "value_dim": gene.value_dim(head_dim)}
    ahead = {"ahead": gene.clip} if gene.prefix else {}
    relative = None if gene.clip is None else Part(Relative, clip=gene.clip, **dims, **ahead)
    weigh = Part(Weigh, score=gene.score, sinks=sinks)
    fades = gene.forget == "mask"
    return Part(Scored, scale=scale, terms=terms, weigh=weigh, fades=fades, relative=relative, mix=mix)


def special_scores_part(gene: Attn, width: int, scale: float) -> Part:
    heads, _, _ = gene.sizes(width)
    if isinstance(gene.score, Form):
        first, second = map(int, gene.score.arguments)
        return Part(Simplicial, first=first, second=second, scale=scale)
    if not isinstance(gene.sparse, Form):
        return Part(LocalLinear, heads=heads, scale=scale)
    block, *more = map(int, gene.sparse.arguments)
    if gene.special == "summary":
        return Part(Summarised, block=block, scale=scale)
    if gene.special == "nsa":
        return Part(
            NativeSparse,
            width=gene.seen(width),
            heads=heads,
            block=block,
            count=more[0],
            window=more[1],
            scale=scale,
        )
    return Part(Grouped, block=block, count=more[0], own=gene.special == "landmark", scale=scale)


def output_part(gene: Attn, width: int, backend: Backend) -> Part:
    heads, _, head_dim = gene.sizes(width)
    difference = None
    if gene.diff != "none":
        start = 0.2 if gene.lambda_init is None else gene.lambda_init
        norm = norm_part(2 * head_dim, backend)
        difference = Part(Differential, head_dim=head_dim, start=start, norm=norm)
    channels, biased = heads * head_dim, gene.bias == "all"
    gate = Part(Dense, in_features=gene.seen(width), out_features=channels, bias=False)
    out = Part(Dense, in_features=channels, out_features=width, bias=biased)
    if isinstance(gene.experts, int):
        out = Part(ExpertOutputs, width=width, experts=gene.experts, head_dim=head_dim)
    return Part(
        Output,
        gate=gate if gene.out_gate == "sigmoid" else None,
        difference=difference,
        norm=norm_part(head_dim, backend) if gene.out_norm == "rms" else None,
        out=out,
    )
