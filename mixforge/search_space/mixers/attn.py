"""Softmax attention: o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over s <= t, and over s > t - W with a window; and
what the field does to its keys and values, pattern, positions, scores and outputs.

The equations of the genes stand with their modules: `attention_memory`, `attention_states`, `attention_filters` and
`attention_codes` for keys and values, `attention_pattern` for windows and sinks, `attention_strides`,
`attention_choice` and `attention_eviction` for sparse patterns, `attention_position` for positions, `attention_heads`
for norms, queries of low rank and differential outputs, `attention_scores` for terms and weights of scores,
`attention_mix` for heads that mix and `attention_scan` for learned queries, each with its sources.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; multi-query: Shazeer 2019 (arXiv 1911.02150); grouped
queries: Ainslie et al. 2023 (arXiv 2305.13245); shared keys: He et al. 2024 (Rodimus, arXiv 2410.06577); fewer query
heads: Filipek 2025 (arXiv 2510.01817), which is `heads` and `head_dim`; query and key norms: Dehghani et al. 2023
(arXiv 2302.05442), over all heads at once as in the reference code of OLMo 2; output gate o * sigmoid(W_g x): Qiu et
al. 2025 (arXiv 2505.06708), elementwise after the attention; norm of each head's output and the other genes of a Pro
block: Lin et al. 2025 (arXiv 2503.02130), section 3.2; one cache for many layers, `kv=own` and `kv=shared`: Sun et
al. 2024 (arXiv 2405.05254), equation 3; keys and values of what a mixer beside it makes of the same input,
`source=context` and `source=both`: Pilault et al. 2023 (arXiv 2306.09539), whose context states are a state space
model's and, as in the listing of its appendix, seen as tokens are; attention to the stream and the embeddings,
`reads=embeddings`: Glorioso et al. 2024 (arXiv 2405.16712), figure 2.

Departures: `kv=own` is an attention layer of its own whose keys and values the `kv=shared` layers above read; in the
paper the shared keys and values belong to no layer. Norms have one set of weights for all heads, where the reference
code of the Pro block has one for each. Cosine attention is `qk_norm=l2`, whose learned scale stands for a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from mixforge.search_space.attention_cost import (
    count_weights,
    replaceable_slots,
    score_flops,
    slots_of,
    state_bytes_of,
    states_cost,
)
from mixforge.search_space.attention_legality import why_unfit
from mixforge.search_space.attention_parts import (
    memory_part,
    output_part,
    pattern_part,
    position_part,
    queries_part,
    routing_part,
    scores_part,
    stateful_part,
)
from mixforge.search_space.expression import spell_number
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole, replace
from mixforge.search_space.heads import default_heads, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.mixers.linear import Linear
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attention import Attention
from mixforge.search_space.parts.attention_scores import ForgetGate
from mixforge.search_space.parts.beside import Beside, SumFuse
from mixforge.search_space.parts.embedded import Embedded
from mixforge.search_space.parts.linear_points import POINTS
from mixforge.search_space.parts.norm import norm_part

# Of the angles of a turn.
_BASE = 10000.0
# Numbers for each channel of a state space that makes keys: those of the configurations of Attamba's public code.
_STATES = 32


@dataclass(frozen=True, slots=True)
class Attn(Mixer):
    """Softmax attention.

    `kv`: every query head has its keys and values (mha), all share one (mqa), or n do (gqa(n)); all share one head of
    keys, and have values of their own (ska); they are made of a latent of the given rank, beside channels that turn
    (mla(rank, rope_dim)); by state spaces that begin anew every n tokens (ssm_chunk(n)), or by one of n numbers for
    each head and channel (filters(n)); values are made of one key head (reuse); keys are quantised to n codes, which
    takes no cache (vq(n)); `own` also publishes keys and values to the layers above, and `shared` reads what the
    nearest `own` below has published. `source`: keys and values are of the token, of the context (what the branches
    beside it make of it that read no context), or there are two attentions, one to each, and their sum. `query`: made
    of the token, or learned and the same for all. `query_rank`: queries through so many channels, with a norm.
    `mask`: a token sees earlier ones (causal), and with prefix(n) the first n tokens are read together: each sees all n.
    `window`: how far a token sees; stochastic(a, b) takes a or b for each batch of training, and b otherwise; of it
    every `dilation`-th token. `sink`: a learned logit in the denominator, or the first n tokens beside a window.
    `meta`: learned keys and values that every token sees. `rotary`: the share of channels that turn. `forget`: decays
    of each head, whose logarithms are added to the scores (head), or which multiply the weights (mask). `experts`: of
    so many query heads, each token takes `heads`. `reads`: the stream, or the stream and the embeddings.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "fox": {"forget": "head", "pos": "none"},
        "fox_pro": {
            "forget": "head",
            "pos": "none",
            "qk_norm": "rms",
            "kv_shift": "token",
            "out_norm": "rms",
            "out_gate": "sigmoid",
        },
        "aaren": {"query": "learned", "pos": "none"},
    }

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None
    kv: Annotated[
        str | Form,
        Choice("mha", "mqa", "ska", "reuse", "own", "shared"),
        Call("gqa", Whole(1, 256)),
        Call("mla", Whole(1, 16384), Whole(0, 1024)),
        Call("ssm_chunk", Whole(2, 65536)),
        Call("filters", Whole(2, 1024)),
        Call("vq", Whole(2, 65536)),
    ] = "mha"
    source: Annotated[str, Choice("token", "context", "both")] = "token"
    query: Annotated[str, Choice("token", "learned")] = "token"
    query_rank: Annotated[str | int, Choice("none"), Whole(1, 16384)] = "none"
    mask: Annotated[str | Form, Choice("causal"), Call("prefix", Whole(2, 1048576))] = "causal"
    window: Annotated[
        str | int | Form,
        Choice("none"),
        Whole(2, 1048576),
        Call("stochastic", Whole(2, 1048576), Whole(2, 1048576)),
    ] = "none"
    dilation: Annotated[int, Whole(1, 4096)] = 1
    sparse: Annotated[
        str | Form,
        Choice("none"),
        Call("strided", Whole(2, 65536)),
        Call("fixed", Whole(3, 65536), Whole(1, 65536)),
        Call("chunk", Whole(2, 65536)),
        Call("checkpoints", Whole(2, 65536)),
        Call("boundaries", Whole(2, 65536), Whole(2, 65536)),
        Call("block_topk", Whole(2, 65536), Whole(2, 65536)),
        Call("block_cdf", Whole(2, 65536), Real(0.01, 1)),
        Call("landmark", Whole(2, 65536), Whole(1, 65536)),
        Call("hsa", Whole(2, 65536), Whole(1, 65536)),
        Call("summary", Whole(2, 65536)),
        Call("nsa", Whole(2, 65536), Whole(2, 65536), Whole(1, 1048576)),
        Call("lte", Whole(4, 1048576), Whole(1, 1048576)),
    ] = "none"
    sink: Annotated[str | Form, Choice("none", "learned"), Call("tokens", Whole(1, 4096))] = "none"
    meta: Annotated[int, Whole(0, 4096)] = 0
    pos: Annotated[
        str | Form,
        Choice("rope", "none", "xpos", "lrpe", "carope", "alibi", "alibi_rope"),
        Call("relative", Whole(1, 4096)),
    ] = "rope"
    theta: Annotated[float, Real(1, 1e12)] = _BASE
    rotary: Annotated[float, Real(0.01, 1)] = 1.0
    qk_norm: Annotated[str, Choice("none", "rms", "rms_all", "l2")] = "none"
    bias: Annotated[str, Choice("none", "qkv", "all")] = "none"
    kv_shift: Annotated[str, Choice("none", "token")] = "none"
    score: Annotated[
        str | Form,
        Choice("softmax", "sigmoid", "relu", "relu2", "normalise", "local_linear"),
        Call("simplicial", Whole(1, 65536), Whole(1, 65536)),
    ] = "softmax"
    temper: Annotated[str, Choice("none", "ssmax")] = "none"
    forget: Annotated[str, Choice("none", "head", "mask")] = "none"
    diff: Annotated[str | Form, Choice("none", "full"), Call("shared", Whole(1, 1024))] = "none"
    lambda_init: Annotated[float | None, Real(0, 1)] = None
    headmix: Annotated[str | Form, Choice("none", "static"), Call("dynamic", Whole(1, 64))] = "none"
    experts: Annotated[str | int, Choice("none"), Whole(2, 4096)] = "none"
    out_norm: Annotated[str, Choice("none", "rms")] = "none"
    out_gate: Annotated[str, Choice("none", "sigmoid")] = "none"
    reads: Annotated[str, Choice("stream", "embeddings")] = "stream"

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Query heads, key/value heads (those it reads, for `shared`) and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        head_dim = max(1, width // heads) if self.head_dim is None else self.head_dim
        if isinstance(self.kv, Form):
            return heads, int(self.kv.arguments[0]) if self.kv.name == "gqa" else heads, head_dim
        return heads, 1 if self.kv in ("mqa", "reuse") else heads, head_dim

    def key_heads(self, kv_heads: int) -> int:
        """Heads of keys, which may be fewer than those of values."""
        return 1 if self.kv == "ska" else kv_heads

    def turning_heads(self, kv_heads: int) -> int:
        """Heads of what turns by its position."""
        return 1 if self.latent is not None else self.key_heads(kv_heads)

    @property
    def norms_input(self) -> bool:
        return self.reads == "embeddings"

    def seen(self, width: int) -> int:
        """Channels that it reads."""
        return 2 * width if self.reads == "embeddings" else width

    @property
    def latent(self) -> tuple[int, int] | None:
        """Rank and turning channels of `mla`."""
        if isinstance(self.kv, Form) and self.kv.name == "mla":
            return int(self.kv.arguments[0]), int(self.kv.arguments[1])
        return None

    @property
    def chunk(self) -> int | None:
        """Tokens of a chunk of which state spaces make keys and values."""
        return (
            int(self.kv.arguments[0]) if isinstance(self.kv, Form) and self.kv.name == "ssm_chunk" else None
        )

    @property
    def filters(self) -> int | None:
        """Numbers of each channel in the state space that each head has."""
        return int(self.kv.arguments[0]) if isinstance(self.kv, Form) and self.kv.name == "filters" else None

    @property
    def codes(self) -> int | None:
        """Of each head, to which keys are quantised."""
        return int(self.kv.arguments[0]) if isinstance(self.kv, Form) and self.kv.name == "vq" else None

    def states(self, width: int) -> Linear:
        """The state space that makes keys, and again values, of a chunk; of half as many channels as keys have."""
        heads, _, head_dim = self.sizes(width)
        inner = heads * head_dim
        value_dim = max(1, inner // default_heads(inner) // 2)
        point = {**POINTS["mamba2"], "key_dim": _STATES, "value_dim": value_dim}
        return Linear(**point).canonical(inner)  # type: ignore[arg-type]

    @property
    def windows(self) -> tuple[int | None, int | None]:
        """The window, None for every token, and the shorter one that training may take."""
        if isinstance(self.window, Form):
            return int(self.window.arguments[1]), int(self.window.arguments[0])
        return (None if isinstance(self.window, str) else self.window), None

    @property
    def first(self) -> int:
        """First tokens that stay in sight where others do not."""
        if isinstance(self.sink, Form) and (self.window != "none" or self.evicts is not None):
            return int(self.sink.arguments[0])
        return 0

    @property
    def clip(self) -> int | None:
        """The largest distance with a key of its own."""
        return int(self.pos.arguments[0]) if isinstance(self.pos, Form) else None

    @property
    def prefix(self) -> int:
        return int(self.mask.arguments[0]) if isinstance(self.mask, Form) else 0

    @property
    def distances(self) -> int:
        """How many distances have a key of their own, those of tokens ahead included."""
        return 0 if self.clip is None else self.clip + 1 + (self.clip if self.prefix else 0)

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned by their position."""
        return self.pos in ("rope", "xpos", "lrpe", "carope", "alibi_rope")

    def turning(self, width: int) -> int | float:
        """Channels of a head that turn: no whole number where `rotary` does not fit."""
        return self.latent[1] if self.latent is not None else self.sizes(width)[2] * self.rotary

    @property
    def special(self) -> str | None:
        """The name of what stands in the place of attention's usual scores, where something does."""
        if isinstance(self.score, Form) or self.score == "local_linear":
            return "simplicial" if isinstance(self.score, Form) else "local_linear"
        if isinstance(self.sparse, Form) and self.sparse.name in ("landmark", "hsa", "summary", "nsa"):
            return self.sparse.name
        return None

    @property
    def by_block(self) -> tuple[int, int] | None:
        """Of a pattern whose tokens see their own block: its length, and how many tokens of each earlier one are kept."""
        if not isinstance(self.sparse, Form) or self.sparse.name not in ("fixed", "chunk"):
            return None
        return int(self.sparse.arguments[0]), int(
            self.sparse.arguments[1]
        ) if self.sparse.name == "fixed" else 0

    @property
    def boundaries(self) -> tuple[int, int] | None:
        """Of a pattern of the last tokens of blocks: a block's length, and how many leading tokens are seen."""
        if not isinstance(self.sparse, Form) or self.sparse.name not in ("checkpoints", "boundaries"):
            return None
        leading = int(self.sparse.arguments[1]) if self.sparse.name == "boundaries" else 1
        return int(self.sparse.arguments[0]), leading

    @property
    def evicts(self) -> tuple[int, int] | None:
        """The window, and how many tokens behind it are kept, where the others are evicted."""
        if not isinstance(self.sparse, Form) or self.sparse.name != "lte":
            return None
        return int(self.sparse.arguments[0]), int(self.sparse.arguments[1])

    @property
    def scores(self) -> Literal["fused", "biased", "scored", "special"]:
        """Which form of the scores its genes need."""
        if self.special is not None:
            return "special"
        weighs = self.score != "softmax" or self.forget == "mask" or self.headmix != "none"
        if weighs or self.clip is not None:
            return "scored"
        added = self.forget != "none" or self.sink == "learned" or self.meta > 0
        return "biased" if added or self.pos in ("alibi", "alibi_rope") else "fused"

    def lends(self, width: int) -> Mapping[str, Loan]:
        return {"cache": self._loan(width)} if self.kv == "own" else {}

    def borrows(self, width: int) -> Mapping[str, Loan]:
        if self.source != "token":
            return {"context": Loan("pass", ((width,),))}
        cache = {"cache": self._loan(width)} if self.kv == "shared" else {}
        return cache | ({"embedding": Loan("pass", ((width,),))} if self.reads == "embeddings" else {})

    def _loan(self, width: int) -> Loan:
        """Keys, as they are turned, and values."""
        # Balanced slopes leave the turn as it is.
        name = "rope" if self.pos == "alibi_rope" else self.pos
        turn = f"pos={name}, theta={spell_number(self.theta)}, rotary={spell_number(self.rotary)}"
        return Loan("cache", (self.sizes(width)[1:],) * 2, turn=turn if self.turns else "")

    def unread(self, names: frozenset[str]) -> Self:
        return replace(self, kv="mha") if "cache" in names else self

    def placed(self, index: int, count: int) -> Self:
        if self.diff == "none" or self.lambda_init is not None:
            return self
        return replace(self, lambda_init=0.8 - 0.6 * math.exp(-0.3 * index))

    def why_illegal(self, width: int) -> str | None:
        return why_unfit(self, width)

    def canonical(self, width: int) -> Self:
        heads, kv_heads, head_dim = self.sizes(width)
        kv, window = self.kv, self.window
        if isinstance(kv, Form) and kv.name == "gqa":
            kv = "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else kv
        if kv in ("mqa", "ska") and heads == 1:
            kv = "mha"
        if isinstance(window, Form) and window.arguments[0] == window.arguments[1]:
            window = int(window.arguments[0])
        qk_norm = "rms" if self.qk_norm == "rms_all" and heads == 1 else self.qk_norm
        default_dim = max(1, width // heads)
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if head_dim == default_dim and width % heads == 0 else head_dim,
            kv=kv,
            window=window,
            sink="none" if isinstance(self.sink, Form) and self.first == 0 else self.sink,
            theta=self.theta if self.pos in ("rope", "xpos", "lrpe", "alibi_rope") else _BASE,
            rotary=self.rotary if self.turns and self.latent is None else 1.0,
            kv_shift="none" if kv == "shared" else self.kv_shift,
            lambda_init=None if self.diff == "none" else self.lambda_init,
            # A differential layer has its norm.
            out_norm=self.out_norm if self.diff == "none" else "none",
            qk_norm=qk_norm,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        if self.kv in ("own", "shared"):
            raise ValueError(f"attn(kv={self.kv}) has no heads to give away; give it no factor inside '|'")
        heads, _, head_dim = self.sizes(width)
        experts = self.experts if isinstance(self.experts, str) else shared_heads("attn", self.experts, share)
        # gqa(n) says how many key/value heads this branch has, so the share leaves it as it is.
        part = replace(self, heads=shared_heads("attn", heads, share), head_dim=head_dim, experts=experts)
        return part.canonical(width)

    def sources(self) -> tuple[Self, ...]:
        """The attentions of which it is the sum."""
        if self.source != "both":
            return (self,)
        return tuple(replace(self, source=each) for each in ("token", "context"))

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        if self.source == "both":
            first, second = (each.cost(width, length, itemsize) for each in self.sources())
            return first + second
        sizes = self.sizes(width)
        matrices, reading, vectors = count_weights(self, width, sizes)
        kept, carried = state_bytes_of(self, width, itemsize, sizes)
        made = states_cost(self, width, length, itemsize)
        carried += made.state_bytes
        held = slots_of(self, length) * kept
        written = kept * (1 + replaceable_slots(self, length)) if held else 0
        lent = 2 * length * math.prod(sizes[1:]) if self.kv == "shared" else 0
        params = matrices + reading + vectors + made.params
        return Cost(
            params=params,
            # Keys and values that are made when they are read are made of the learned entries as well.
            flops=2 * (length * matrices + (length + self.meta) * reading)
            + score_flops(self, length, sizes)
            + made.flops,
            state_bytes=held + carried,
            decode_bytes=params * itemsize + held + 2 * carried + lent * itemsize + written,
        )

    def key_dim(self, head_dim: int) -> int:
        """Channels of a query and of a key, of those of a head."""
        latent = self.latent
        return head_dim if latent is None else head_dim + latent[1]

    def value_dim(self, head_dim: int) -> int:
        """Channels of a value; two heads' side by side in differential attention."""
        return head_dim if self.diff == "none" else 2 * head_dim

    def build(self, width: int, backend: Backend) -> Part:
        if self.source == "both":
            branches = [each.build(width, backend) for each in self.sources()]
            return Part(Beside, branches=branches, fuse=Part(SumFuse))
        gene = self.canonical(width)
        part = stateful_part(gene, width, backend) or Part(
            Attention,
            queries=queries_part(gene, width, backend),
            memory=memory_part(gene, width, backend),
            position=position_part(gene, width),
            pattern=pattern_part(gene, backend),
            scores=scores_part(gene, width, backend),
            output=output_part(gene, width, backend),
            forget=Part(ForgetGate, width=gene.seen(width), heads=gene.sizes(width)[0])
            if gene.forget != "none"
            else None,
            routing=routing_part(gene, width),
            meta=gene.meta,
            crosses=gene.source == "context",
        )
        if gene.reads == "stream":
            return part
        return Part(Embedded, norm=norm_part(gene.seen(width), backend), inner=part)
