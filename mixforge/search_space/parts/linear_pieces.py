"""The pieces that the linear family is put together from, by the values of its genes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Form
from mixforge.search_space.mixer import Backend
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import identity, relu, sigmoid, silu
from mixforge.search_space.parts.decay import (
    BoundedDecay,
    ExpDecay,
    HeadDecay,
    KeyDecay,
    LayerDecay,
    LearnedDecay,
    SigmoidChannelDecay,
    SigmoidDecay,
    SoftplusChannelDecay,
    SoftplusDecay,
    TemperedDecay,
)
from mixforge.search_space.parts.feature_map import (
    FavorMap,
    HedgehogMap,
    LearnedMap,
    OuterMap,
    elu1,
    exponential,
    softmax,
    taylor,
    taylor_cubic,
    taylor_features,
    taylor_line,
)
from mixforge.search_space.parts.level_weights import LEVELS, LevelWeights
from mixforge.search_space.parts.linear_output import (
    Bonus,
    ChannelSkip,
    GatedOutput,
    GroupNorm,
    HeadSkip,
    NormedOutput,
    PartsNorm,
    SimpleNorm,
    ValueConvolution,
)
from mixforge.search_space.parts.memories import ApartKeys, Memories
from mixforge.search_space.parts.norm import SimpleRMSNorm, norm_part
from mixforge.search_space.parts.piece import NOTHING, Piece
from mixforge.search_space.parts.removal_keys import RATE_RANK, RemovalKeys
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.token_shift import SHIFT_RANK, TokenShift
from mixforge.search_space.parts.turn import FixedTurn, LearnedTurn, PhaseTurn
from mixforge.search_space.parts.write_gate import (
    BLEND_RANK,
    ExpGate,
    LengthGate,
    SigmoidGate,
    ValueBlend,
    ValueGate,
    WriteStrength,
)

Map = Callable[[Tensor], Tensor]

# Feature maps without weights, by name; taylor by its order.
PLAIN_MAPS: dict[str, Map | None] = {
    "none": None,
    "elu1": elu1,
    "relu": relu,
    "silu": silu,
    "exp": exponential,
    "softmax": softmax,
}
TAYLOR_MAPS: dict[int, Map] = {1: taylor_line, 2: taylor, 3: taylor_cubic}
GATES: dict[str, Map | None] = {
    "silu": silu,
    "sigmoid": sigmoid,
    "linear": identity,
    "inner": identity,
    "self": None,
    "none": None,
}


def mapped_channels(phi: str | Form, channels: int) -> int:
    """Features of a feature map over this many channels."""
    if not isinstance(phi, Form):
        return 2 * channels if phi == "hedgehog" else channels
    count = int(phi.arguments[0])
    if phi.name == "taylor":
        return taylor_features(channels, count)
    return count if phi.name == "favor" else channels * count


def map_piece(phi: str | Form, heads: int, channels: int, uses: int) -> tuple[Map | None, Piece]:
    """A feature map that is a function, or one that is a part; `uses` times a token."""
    if isinstance(phi, str) and phi in PLAIN_MAPS:
        return PLAIN_MAPS[phi], NOTHING
    if isinstance(phi, Form) and phi.name == "taylor":
        return TAYLOR_MAPS[int(phi.arguments[0])], NOTHING
    if not isinstance(phi, Form):
        square = heads * channels * channels
        return None, Piece(
            part=lambda: Part(
                LearnedMap if phi == "learned" else HedgehogMap, heads=heads, channels=channels
            ),
            params=square + heads * channels,
            macs=uses * square,
        )
    count = int(phi.arguments[0])
    product = heads * channels * count
    if phi.name == "favor":
        return None, Piece(part=lambda: Part(FavorMap, channels=channels, count=count), macs=uses * product)
    return None, Piece(
        part=lambda: Part(OuterMap, heads=heads, channels=channels, count=count),
        params=product,
        macs=uses * product,
    )


def fixed_decay_piece(decay: str, heads: int, place: tuple[int, int]) -> Piece:
    """decay=head and decay=layer."""
    if decay == "head":
        return Piece(part=lambda: Part(HeadDecay, heads=heads))
    return Piece(part=lambda: Part(LayerDecay, heads=heads, layer=place[0], layers=place[1]))


def decay_piece(
    forget: str,
    temperature: float,
    rank: int | None,
    width: int,
    heads: int,
    channels: int | None,
    place: tuple[int, int],
    cap: float | None = None,
) -> Piece:
    """A decay that is not fixed: one for each head, or for each of its `channels`."""
    count = heads if channels is None else heads * channels
    rates = 2 * count if forget == "tempered" else count
    follows = forget not in ("key", "learned")
    matrix = width * rates if follows else 0
    if rank is not None and channels is not None and follows:
        matrix = rank * (width + rates)
    vectors = {"key": 0, "softplus": count + heads}.get(forget, rates)
    return Piece(
        part=lambda: _decay_part(forget, temperature, rank, width, heads, channels, place, cap),
        params=matrix + vectors,
        macs=matrix,
    )


def _decay_part(
    forget: str,
    temperature: float,
    rank: int | None,
    width: int,
    heads: int,
    channels: int | None,
    place: tuple[int, int],
    cap: float | None,
) -> Part:
    by_rank = {} if channels is None else {"channels": channels, "rank": rank}
    match forget:
        case "key":
            return Part(KeyDecay, heads=heads, by_channel=channels is not None)
        case "learned":
            return Part(LearnedDecay, heads=heads, channels=channels)
        case "softplus":
            softplus_decay = SoftplusDecay if channels is None else SoftplusChannelDecay
            return Part(softplus_decay, width=width, heads=heads, **by_rank)
        case "sigmoid":
            sigmoid_decay = SigmoidDecay if channels is None else SigmoidChannelDecay
            others = {**by_rank, **({} if cap is None else {"cap": cap})}
            return Part(sigmoid_decay, width=width, heads=heads, **others, temperature=temperature)
        case "tempered":
            return Part(TemperedDecay, width=width, heads=heads, **by_rank)
    either = {"width": width, "heads": heads, "channels": channels}
    either["rank"] = None if channels is None else rank
    if forget in ("exp", "capped"):
        return Part(ExpDecay, **either, **({"capped": True} if forget == "capped" else {}))
    return Part(BoundedDecay, **either, layer=place[0], layers=place[1])


def turn_piece(pos: str | Form, width: int, heads: int, channels: int) -> Piece:
    """What doubles queries and keys."""
    count = heads * channels
    if isinstance(pos, Form):
        return Piece(part=lambda: Part(FixedTurn, most=int(pos.arguments[0])))
    if pos == "lrpe":
        return Piece(part=lambda: Part(LearnedTurn, heads=heads, channels=channels), params=count)
    return Piece(
        part=lambda: Part(PhaseTurn, width=width, heads=heads, channels=channels),
        params=width * count,
        macs=width * count,
    )


def conv_piece(channels: int, size: int, activation: str, bias: bool, backend: Backend) -> Piece:
    """The short convolution of queries, keys and values."""
    return Piece(
        part=lambda: Part(
            ShortConvolution,
            channels=channels,
            size=size,
            activation=activation,
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
            **({"bias": True} if bias else {}),
        ),
        params=channels * (size + int(bias)),
        macs=channels * size,
    )


def shift_piece(shift: str, width: int, count: int) -> Piece:
    """The token shift of `count` projections."""
    rank = 2 * count * SHIFT_RANK * width if shift == "lowrank" else 0
    own = width if shift == "lowrank" else 0
    return Piece(
        part=lambda: Part(TokenShift, width=width, count=count, lowrank=shift == "lowrank"),
        params=count * width + own + rank,
        macs=rank,
    )


def strength_piece(width: int, heads: int, most: int) -> Piece:
    """beta of the delta rule."""
    return Piece(
        part=lambda: Part(WriteStrength, width=width, heads=heads, most=most),
        params=width * heads,
        macs=width * heads,
    )


def removal_piece(width: int, heads: int, features: int, most: int) -> Piece:
    """What rule=dplr removes and how strongly."""
    matrix = RATE_RANK * (width + heads * features)
    return Piece(
        part=lambda: Part(RemovalKeys, width=width, heads=heads, features=features, most=most),
        params=matrix + 3 * heads * features,
        macs=matrix,
    )


def memories_piece(width: int, count: int, top_k: int, is_shared: bool) -> Piece:
    """The router of several memories."""
    return Piece(
        part=lambda: Part(Memories, width=width, count=count, top_k=top_k, is_shared=is_shared),
        params=width * count,
        macs=width * count,
    )


def apart_piece(width: int, keys: int, rank: int) -> Piece:
    """What the queries and keys of the partitions have beside the others."""
    matrix = 2 * rank * (width + keys)
    return Piece(part=lambda: Part(ApartKeys, width=width, keys=keys, rank=rank), params=matrix, macs=matrix)


def levels_piece(width: int, heads: int) -> Piece:
    """The weights of the levels of levels=log."""
    count = heads * LEVELS
    return Piece(
        part=lambda: Part(LevelWeights, width=width, heads=heads),
        params=(width + 1) * count,
        macs=width * count,
    )


def write_gate_piece(width: int, heads: int) -> Piece:
    """in_gate=sigmoid."""
    return Piece(
        part=lambda: Part(SigmoidGate, width=width, heads=heads),
        params=(width + 1) * heads,
        macs=width * heads,
    )


def exp_gate_piece(width: int, heads: int, cap: float | None) -> Piece:
    """in_gate=exp."""
    return Piece(
        part=lambda: Part(ExpGate, width=width, heads=heads, **({} if cap is None else {"cap": cap})),
        params=(width + 1) * heads,
        macs=width * heads,
    )


def value_gate_piece(rank: int, width: int, heads: int, value_dim: int) -> Piece:
    """The low-rank gate of the values."""
    matrix = rank * (width + heads * value_dim)
    return Piece(
        part=lambda: Part(ValueGate, width=width, heads=heads, value_dim=value_dim, rank=rank),
        params=matrix + heads * value_dim,
        macs=matrix,
    )


def length_piece(heads: int) -> Piece:
    """norm=length."""
    return Piece(part=lambda: Part(LengthGate, heads=heads), params=heads)


def blend_piece(width: int, heads: int, value_dim: int) -> Piece:
    """values=shared."""
    matrix = BLEND_RANK * (width + heads * value_dim)
    return Piece(
        part=lambda: Part(ValueBlend, width=width, heads=heads, value_dim=value_dim),
        params=matrix + heads * value_dim,
        macs=matrix,
    )


def skip_piece(skip: str, heads: int, value_dim: int, features: int) -> Piece:
    """What is added to the output beside the read of the state."""
    if skip == "head":
        return Piece(part=lambda: Part(HeadSkip, heads=heads), params=heads)
    if skip == "channel":
        return Piece(
            part=lambda: Part(ChannelSkip, heads=heads, value_dim=value_dim), params=heads * value_dim
        )
    return Piece(part=lambda: Part(Bonus, heads=heads, features=features), params=heads * features)


def local_piece(heads: int, value_dim: int, taps: int, backend: Backend) -> Piece:
    """skip=conv."""
    operation = short_conv.form(backend)
    return Piece(
        part=lambda: Part(ValueConvolution, heads=heads, value_dim=value_dim, size=taps, operation=operation),
        params=value_dim * (taps + 1),
        macs=heads * value_dim * taps,
    )


def output_piece(
    out_norm: str,
    out_gate: str,
    gate_rank: int | None,
    width: int,
    heads: int,
    value_dim: int,
    backend: Backend,
    groups: int = 1,
) -> Piece:
    """Norm, gate and output projection."""
    inner = heads * value_dim
    weights = {"rms": value_dim, "joint": inner, "gated": inner, "grouped": inner, "group": 2 * inner}
    macs = width * inner
    bias = 0
    others: dict[str, int | bool] = {}
    if out_gate not in ("none", "self") and gate_rank is not None:
        macs += gate_rank * (width + inner)
        bias = 0 if out_gate == "inner" else inner
        others["rank"] = gate_rank
        others |= {"inner": True} if out_gate == "inner" else {}
    elif out_gate not in ("none", "self"):
        macs += width * inner
    if out_gate == "self":
        others["own"] = True
    if out_norm in ("joint", "simple"):
        others["joint"] = True
    return Piece(
        part=lambda: Part(
            GatedOutput if out_norm in ("gated", "grouped") else NormedOutput,
            width=width,
            heads=heads,
            value_dim=value_dim,
            norm=_output_norm(out_norm, heads, value_dim, groups, backend),
            activation=GATES[out_gate],
            **others,
        ),
        params=macs + weights.get(out_norm, 0) + bias,
        macs=macs,
    )


def _output_norm(out_norm: str, heads: int, value_dim: int, groups: int, backend: Backend) -> Part | None:
    inner = heads * value_dim
    match out_norm:
        case "rms":
            return norm_part(value_dim, backend)
        case "joint" | "gated":
            return norm_part(inner, backend)
        case "grouped":
            return Part(PartsNorm, parts=groups, channels=inner, norm=Part(SimpleRMSNorm))
        case "simple":
            return Part(SimpleNorm)
        case "group":
            return Part(GroupNorm, heads=heads, value_dim=value_dim)
    return None
