"""Linear attention and state-space duality: a recurrence whose state is a matrix, one for each head.

    S <- D_t S_{t-1}                                                  decay
    S_t = S + k_t v_t^T                                               rule=add
    S_t = S + k_t (beta_t (v_t - S^T k_t))^T                          rule=delta
    S_t = S - (a_t kappa_t) (S_{t-1}^T kappa_t)^T + k_t v_t^T         rule=dplr
    o_t = S_t^T q_t

With rule=dplr kappa_t is a removal key and a_t a rate for each key channel (`parts/removal_keys`). rule=second adds
with the keys that a recurrence over the keys reads (`kernels/second_order`); rule=slots(m) attends to m slots, whose
decays are those of channels (`kernels/slot_attention`).

Genes, from the input to the output:
    shift       what each projection reads of the token before (`parts/token_shift`)
    conv, act   short convolution of queries, keys and values, with a bias by bias=conv, then `act`: SiLU where
                there is a convolution, unless it is said
    values      shared blends in the values of the last layer with values=own (`parts/write_gate`); context makes them
                of what the branches beside it say that read no context (WuNeng: `parts/linear_points`)
    decay       none is 1; head and layer fixed numbers for each head; scalar one for each token and head, channel
                one for each key channel too, both S <- Diag(D_t) S Diag(D'_t), for each value channel too
    forget      how these last three follow from the input, W of rank `forget_rank` by channel, or that they are learned
                and the same for all tokens (`parts/decay`)
    key         forget takes k_t = 1 - D_t and has no projection of keys; latent makes each key channel a softmax
                over time and the queries a softmax over the channels
    pos         rope, xpos: rotation before the feature map. lrpe, phase, cosine(M): queries and keys doubled by an
                angle after it (`parts/turn`). With phase a decay is complex.
    phi         feature map of queries and keys (`parts/feature_map`); qk_norm=l2 makes their length 1 after it.
                Queries are divided by sqrt(K), but for maps that scale themselves and where the paper does not.
    in_gate     what is written times dt, sigmoid or exp of a projection, or 1 - D_t (tied; by channel that is a
                gate of the keys); tempered: the keys times the gate of forget=tempered
    gate_cap    z becomes cap tanh(z / cap) in in_gate=exp and in decay=scalar, forget=sigmoid (Beck et al. 2025, arXiv
                2503.13427)
    value_gate  a gate of this rank on each value channel
    beta        the delta rule's beta_t, and dplr's a_t, are `beta` sigmoid(W x_t); 2 reaches negative eigenvalues
                (Grazzi et al. 2024, arXiv 2411.12537)
    levels      log keeps a state for each level of a Fenwick tree over the past and adds what they read, weighed by
                numbers that follow from the input (`kernels/log_linear`)
    memories    top(n, k) and parts(n, k): n more states for each head, of which a token has k (`parts/memories`)
    init        the state before the first token: zero, learned, or in training noise(sd), drawn from torch's global
                generator, or carry, that of the batch before; prefix(n), what the first n tokens write together
                (`parts/first_state`)
    norm        denominator divides o_t by q_t . z_t, z_t the same recurrence over ones in place of values, and adds
                1e-3 to features that may all be 0 (`parts/feature_map`); max1 by max(|q_t . z_t|, 1); length
                divides each value by a power of its position as it is written
    skip        head adds d_h v_t to o_t, channel d_hc v_t, v_t before its gates; bonus reads the state before it is
                written: o_t = S_{t-1}^T q_t + (q_t . (u k_t)) v_t; late adds (q_t . (u k_t)) v_t after the norm;
                conv(n) adds a depthwise convolution of the last n values, the same for all heads (Guo et al. 2024,
                arXiv 2405.11582)
    out_norm    rms and group normalise each head before the gate, joint and simple (no weights) all heads at once
                before it, gated all at once after it, grouped the heads of each key head at once after it
    out_gate    times silu, sigmoid or nothing (linear) of W x, of rank `gate_rank` where that is a number; inner is
                W_2 sigmoid(W_1 x), self the sigmoid of the output itself

Its famous points, with their papers and departures, are in `parts/linear_points`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from mixforge.kernels import chunked_linear, dplr, log_linear, second_order, slot_attention, twofold_linear
from mixforge.kernels.backend import BeyondKernels, triton_form
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole, replace
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.linear_legality import why_unfit
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts import linear_pieces as pieces
from mixforge.search_space.parts.activation import silu
from mixforge.search_space.parts.decay import LatentDecay
from mixforge.search_space.parts.first_state import CarriedState, FirstState, NoisyState, PrefixState
from mixforge.search_space.parts.layer import TokenMixer
from mixforge.search_space.parts.linear_attention import LinearAttention
from mixforge.search_space.parts.linear_decode import TAKES, FusedLinearAttention
from mixforge.search_space.parts.linear_points import POINTS
from mixforge.search_space.parts.piece import NOTHING, Piece

Recurrence = Callable[..., tuple[Tensor, Tensor | None]]

# Ranks of W where forget_rank says nothing; with forget=softplus it is the value dim.
USUAL_RANKS: dict[str, int | str] = {
    "sigmoid": 16,
    "bounded": "full",
    "exp": 64,
    "capped": 64,
    "tempered": "full",
}
# tau of forget=sigmoid.
USUAL_TEMPERATURE = 16
_USUAL_SIGMOID = Form("sigmoid", (USUAL_TEMPERATURE,))
MOST_FEATURES = 1 << 20
# Value dims, above which torch's own layer norm of a quotient takes less time than `quotient_norm`.
MOST_DIVIDED = 128
# Feature maps that may be 0 in every channel, and what is added to their features under norm=denominator.
SPARSE = ("relu", "learned", "outer")
LEAST = 1e-3


@dataclass(frozen=True, slots=True)
class Linear(Mixer):
    """The linear family. A gene that has no effect is dropped from the canonical form."""

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = POINTS

    rule: Annotated[str | Form, Choice("add", "delta", "dplr", "second"), Call("slots", Whole(1, 1024))] = (
        "add"
    )
    decay: Annotated[str, Choice("none", "head", "layer", "scalar", "channel", "both")] = "none"
    forget: Annotated[
        str | Form,
        Choice("softplus", "sigmoid", "key", "bounded", "exp", "capped", "tempered", "learned"),
        Call("sigmoid", Whole(1, 64)),
    ] = "softplus"
    forget_rank: Annotated[int | str | None, Choice("full"), Whole(1, 1024)] = None
    key: Annotated[str, Choice("own", "forget", "latent")] = "own"
    phi: Annotated[
        str | Form,
        Choice("none", "elu1", "relu", "silu", "exp", "softmax", "learned", "hedgehog"),
        Call("taylor", Whole(1, 3)),
        Call("favor", Whole(1, 1024)),
        Call("outer", Whole(1, 16)),
    ] = "none"
    norm: Annotated[str, Choice("none", "denominator", "max1", "length")] = "none"
    qk_norm: Annotated[str | None, Choice("none", "l2")] = None
    beta: Annotated[int, Whole(1, 2)] = 1
    conv: Annotated[str | int, Choice("none"), Whole(2, 8)] = 4
    act: Annotated[str | None, Choice("none", "silu")] = None
    bias: Annotated[str, Choice("none", "conv")] = "none"
    shift: Annotated[str, Choice("none", "lerp", "lowrank")] = "none"
    pos: Annotated[
        str | Form, Choice("none", "rope", "xpos", "lrpe", "phase"), Call("cosine", Whole(64, 1 << 20))
    ] = "none"
    in_gate: Annotated[str, Choice("none", "dt", "sigmoid", "exp", "tied", "tempered")] = "none"
    value_gate: Annotated[str | int, Choice("none"), Whole(1, 1024)] = "none"
    values: Annotated[str, Choice("plain", "own", "shared", "context")] = "plain"
    levels: Annotated[str, Choice("one", "log")] = "one"
    memories: Annotated[
        str | Form,
        Choice("none"),
        Call("top", Whole(4, 64), Whole(1, 64)),
        Call("parts", Whole(4, 64), Whole(1, 64)),
    ] = "none"
    init: Annotated[
        str | Form,
        Choice("zero", "learned", "carry"),
        Call("noise", Real(0.001, 10)),
        Call("prefix", Whole(2, 1048576)),
    ] = "zero"
    skip: Annotated[
        str | Form, Choice("none", "head", "channel", "bonus", "late"), Call("conv", Whole(2, 8))
    ] = "none"
    out_norm: Annotated[str, Choice("rms", "group", "joint", "simple", "gated", "grouped", "none")] = "rms"
    out_gate: Annotated[str, Choice("silu", "sigmoid", "linear", "inner", "self", "none")] = "silu"
    gate_rank: Annotated[str | int, Choice("full"), Whole(1, 1024)] = "full"
    heads: Annotated[int | None, Whole(1, 256)] = None
    key_heads: Annotated[int | None, Whole(1, 256)] = None
    key_dim: Annotated[int | str | None, Choice("half"), Whole(1, 1024)] = None
    value_dim: Annotated[int | str | None, Choice("double"), Whole(1, 1024)] = None
    gate_cap: Annotated[str | int | float, Choice("none"), Real(1, 1000)] = "none"
    # Sizes at the widths that were asked for, which every question about costs begins with.
    _sizes: dict[int, Sizes] = field(default_factory=dict, init=False, compare=False, repr=False)
    # Which of how many layers of this family it is: no gene, see `placed`.
    place: tuple[int, int] = field(default=(0, 1), init=False, compare=False, repr=False)

    def placed(self, index: int, count: int) -> Self:
        placed = dataclasses.replace(self)
        object.__setattr__(placed, "place", (index, count))
        return placed

    def sizes(self, width: int) -> Sizes:
        """Heads and their dims at this width."""
        found = self._sizes.get(width)
        if found is None:
            found = self._sizes[width] = self._compute_sizes(width)
        return found

    def _compute_sizes(self, width: int) -> Sizes:
        heads = default_heads(width) if self.heads is None else self.heads
        usual = max(1, width // heads)
        key_dim = (
            usual if self.key_dim is None else max(1, usual // 2) if self.key_dim == "half" else self.key_dim
        )
        value_dim = (
            usual if self.value_dim is None else 2 * usual if self.value_dim == "double" else self.value_dim
        )
        channels = pieces.mapped_channels(self.phi, int(key_dim))
        features = 2 * channels if self.turns else channels
        return Sizes(
            heads=heads,
            key_heads=heads if self.key_heads is None else self.key_heads,
            key_dim=int(key_dim),
            value_dim=int(value_dim),
            channels=channels,
            features=features,
            rows=int(self.rule.arguments[0]) if isinstance(self.rule, Form) else features,
            beside=features if isinstance(self.rule, Form) or self.rule == "second" else 0,
            memories=1 if isinstance(self.memories, str) else 1 + int(self.memories.arguments[0]),
            copies=1
            if isinstance(self.memories, str)
            else 2
            if self.memories.name == "parts"
            else 1 + int(self.memories.arguments[0]),
        )

    @property
    def unit_keys(self) -> bool:
        """Whether queries and keys have length 1."""
        return self.rule == "delta" if self.qk_norm is None else self.qk_norm == "l2"

    @property
    def gated_decay(self) -> bool:
        """Whether the decay follows from the input."""
        return self.decay in ("scalar", "channel", "both")

    @property
    def by_channel(self) -> bool:
        """Whether there is a decay for each key channel."""
        return self.decay in ("channel", "both")

    @property
    def turns(self) -> bool:
        """Whether an angle doubles queries and keys."""
        return isinstance(self.pos, Form) or self.pos in ("lrpe", "phase")

    @property
    def normalised(self) -> bool:
        """Whether the output is divided by a sum that the state keeps in a column of its own."""
        return self.norm in ("denominator", "max1")

    @property
    def phi_name(self) -> str:
        """The name of the feature map."""
        return self.phi.name if isinstance(self.phi, Form) else self.phi

    @property
    def forget_form(self) -> str:
        """The name of the form of decays that follow from the input."""
        return self.forget.name if isinstance(self.forget, Form) else self.forget

    @property
    def scales_queries(self) -> bool:
        """Whether queries are divided by sqrt(K): not where a map scales itself or the papers do without."""
        without = (
            self.phi_name in ("taylor", "favor", "softmax", "hedgehog"),
            self.key == "latent",
            self.in_gate == "dt",
            self.norm == "length",
            self.skip == "bonus",
            self.rule == "dplr",
            isinstance(self.rule, Form),
            self.decay == "layer",
        )
        return not any(without)

    @property
    def _local_taps(self) -> int:
        """Of skip=conv; 0 where there is none."""
        return int(self.skip.arguments[0]) if isinstance(self.skip, Form) else 0

    @property
    def has_caps(self) -> bool:
        """Whether it has gates that gate_cap reaches."""
        return self.in_gate == "exp" or (self.decay == "scalar" and self.forget_form == "sigmoid")

    @property
    def activation(self) -> str:
        """Of queries, keys and values."""
        return self.usual_activation if self.act is None else self.act

    @property
    def usual_activation(self) -> str:
        """Where `act` says nothing."""
        return "none" if self.conv == "none" else "silu"

    def rank(self, width: int) -> int | None:
        """Rank of the projection that makes the decays of channels; None for a full one."""
        given = USUAL_RANKS.get(self.forget_form) if self.forget_rank is None else self.forget_rank
        if given is None:
            return self.sizes(width).value_dim
        return None if isinstance(given, str) else given

    def lends(self, width: int) -> Mapping[str, Loan]:
        return {"values": self._values(width)} if self.values == "own" else {}

    def borrows(self, width: int) -> Mapping[str, Loan]:
        if self.values == "context":
            return {"context": Loan("pass", ((width,),))}
        return {"values": self._values(width)} if self.values == "shared" else {}

    def _values(self, width: int) -> Loan:
        size = self.sizes(width)
        return Loan("pass", ((size.heads, size.value_dim),))

    def unread(self, names: frozenset[str]) -> Self:
        return replace(self, values="plain") if "values" in names else self

    def why_illegal(self, width: int) -> str | None:
        size = self.sizes(width)
        follows = isinstance(self.key_dim, str | None) or isinstance(self.value_dim, str | None)
        if follows and width % size.heads != 0:
            return undivided("linear", size.heads, width, "key_dim and value_dim")
        if size.heads % size.key_heads != 0:
            return f"{size.key_heads} key heads do not divide {size.heads} heads (mixer linear)"
        if self.key_dim == "half" and (width // size.heads) % 2 != 0:
            return f"key_dim=half needs an even width for each head, not {width // size.heads} (mixer linear)"
        if self.pos in ("rope", "xpos") and size.key_dim % 2 != 0:
            return f"pos={self.pos} needs an even key_dim, not {size.key_dim} (mixer linear)"
        if size.features > MOST_FEATURES:
            return (
                f"phi={self.phi} makes {size.features} features of key_dim {size.key_dim} (mixer linear); "
                f"give a key_dim with at most {MOST_FEATURES}"
            )
        found = why_unfit(self, size)
        return None if found is None else f"{found} (mixer linear)"

    def canonical(self, width: int) -> Self:
        size = self.sizes(width)
        usual = width // size.heads
        divides = width % size.heads == 0
        key_dim, value_dim = self.key_dim, self.value_dim
        if divides and isinstance(key_dim, int):
            key_dim = None if key_dim == usual else "half" if 2 * key_dim == usual else key_dim
        if divides and isinstance(value_dim, int):
            value_dim = None if value_dim == usual else "double" if value_dim == 2 * usual else value_dim
        forget = "sigmoid" if self.forget == _USUAL_SIGMOID else self.forget
        ranked = self.by_channel and self.forget_form not in ("key", "learned")
        forget_rank = self.forget_rank if ranked else None
        if forget_rank is not None and self.rank(width) == replace(self, forget_rank=None).rank(width):
            forget_rank = None
        out_norm = self.out_norm
        if out_norm == "grouped" and size.key_heads == 1:
            out_norm = "gated"
        if out_norm == "joint" or (out_norm == "gated" and self.out_gate == "none"):
            out_norm = "rms" if size.heads == 1 else "gated" if self.out_gate == "none" else "joint"
        return replace(
            self,
            forget=forget if self.gated_decay else "softplus",
            forget_rank=forget_rank,
            qk_norm=None if self.unit_keys == (self.rule == "delta") else self.qk_norm,
            beta=self.beta if self.rule in ("delta", "dplr") else 1,
            gate_cap=self._cap() if self.has_caps else "none",
            act=None if self.activation == self.usual_activation else self.act,
            bias="none" if self.conv == "none" else self.bias,
            out_norm=out_norm,
            gate_rank="full" if self.out_gate in ("none", "self") else self.gate_rank,
            heads=None if size.heads == default_heads(width) else size.heads,
            key_heads=None if size.key_heads == size.heads else size.key_heads,
            key_dim=key_dim,
            value_dim=value_dim,
        )

    def _cap(self) -> str | int | float:
        """The cap, with one form for each number."""
        cap = self.gate_cap
        return int(cap) if not isinstance(cap, str) and float(cap).is_integer() else cap

    def narrow(self, width: int, share: Fraction) -> Self:
        size = self.sizes(width)
        heads = shared_heads("linear", size.heads, share)
        key_heads = 1 if size.key_heads == 1 else shared_heads("linear's keys", size.key_heads, share)
        return replace(
            self, heads=heads, key_heads=key_heads, key_dim=size.key_dim, value_dim=size.value_dim
        ).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        size = self.sizes(width)
        columns = size.value_dim + int(self.normalised) + size.beside
        mixed = self.mixed(size)
        taps = 0 if isinstance(self.conv, str) else self.conv
        matrix = 4 * size.heads * size.memories * size.rows * columns
        state = matrix * self._states(length) + mixed * max(0, taps - 1) * itemsize
        state += (self._local_taps - 1) * size.heads * size.value_dim * itemsize if self._local_taps else 0
        state += width * itemsize if self.shift != "none" else 0
        state += 4 * size.key_heads * size.channels if self.pos == "phase" else 0
        state += 4 * size.key_heads * size.key_dim if self.key == "latent" else 0
        state += 4 * size.heads if self.in_gate == "exp" else 0
        params = macs = width * mixed
        for piece in self._pieces(width, "torch").values():
            params += piece.params
            macs += piece.macs
        ahead = self._prefix_piece(width, size)
        return Cost(
            params=params + ahead.params,
            flops=2 * (length * macs + min(length, self.prefix) * ahead.macs)
            + self._recurrence_flops(size, length),
            state_bytes=state,
            decode_bytes=params * itemsize
            + 2 * state
            + matrix * (self._states(length + 1) - self._states(length)),
            idle_params=ahead.params,
        )

    def _states(self, length: int) -> int:
        """Of a head, with room for this many tokens."""
        return length.bit_length() if self.levels == "log" else 1

    def _recurrence_flops(self, size: Sizes, length: int) -> int:
        columns = size.value_dim + int(self.normalised)
        sizes = {"heads": size.heads, "key_dim": size.features, "value_dim": columns}
        if self.levels == "log":
            return log_linear.matmul_flops(length, **sizes, rule=str(self.rule))
        if isinstance(self.rule, Form):
            return slot_attention.matmul_flops(length, **sizes, slots=size.rows)
        if self.rule == "dplr":
            return dplr.matmul_flops(length, **sizes)
        if self.rule == "second":
            return second_order.matmul_flops(length, **sizes, decay=self._decay_kind())
        return chunked_linear.matmul_flops(
            # The bonus is read one token before it is written, which takes one more.
            length + int(self.skip == "bonus"),
            key_heads=size.key_heads * size.memories,
            value_heads=size.heads * size.memories,
            key_dim=size.features,
            value_dim=columns,
            rule=self.rule,
            decay=self._decay_kind(),
        )

    def mixed(self, size: Sizes) -> int:
        """Channels of queries, keys and values."""
        keys, values = size.key_heads * size.key_dim, size.heads * size.value_dim
        own = size.copies if size.copies == size.memories else 1
        return keys * (1 if self.key == "forget" else 1 + own) + own * values

    def _decay_kind(self) -> str:
        """The decay as the chunked recurrence has it."""
        if self.by_channel or self.key == "latent":
            return "channel"
        return "scalar" if self.decay == "layer" or self.in_gate == "exp" else self.decay

    @property
    def carries(self) -> bool:
        return self.init == "carry"

    @property
    def prefix(self) -> int:
        if isinstance(self.init, Form) and self.init.name == "prefix":
            return int(self.init.arguments[0])
        return 0

    def _reads(self) -> list[str]:
        """The projections that a token shift gives inputs of their own."""
        from_input = self.gated_decay and self.forget_form not in ("key", "learned")
        writes = (
            self.memories != "none"
            or self.levels != "one"
            or self.rule in ("delta", "dplr")
            or self.in_gate in ("sigmoid", "exp")
            or self.value_gate != "none"
        )
        used = {
            "q": True,
            "k": self.key != "forget",
            "v": self.values != "context",
            "forget": from_input or self.pos == "phase",
            "write": writes,
            "out": self.out_gate not in ("none", "self"),
        }
        return [name for name, is_used in used.items() if is_used]

    def _pieces(self, width: int, backend: Backend) -> dict[str, Piece]:
        """What the module is made of beside its projection, by argument, in the order in which weights are drawn."""
        size = self.sizes(width)
        heads, value_dim = size.heads, size.value_dim
        sets = heads * size.copies
        cap = None if isinstance(self.gate_cap, str) else float(self.gate_cap)
        found: dict[str, Piece] = {}
        if not isinstance(self.conv, str):
            found["conv"] = pieces.conv_piece(
                self.mixed(size), self.conv, self.activation, self.bias == "conv", backend
            )
        if self.gated_decay:
            channels = None
            if self.by_channel:
                channels = size.rows if isinstance(self.rule, Form) else size.channels
            found["decay"] = self._decay_piece(width, sets, channels, cap if self.decay == "scalar" else None)
        elif self.decay != "none":
            found["decay"] = pieces.fixed_decay_piece(self.decay, heads, self.place)
        if self.rule == "delta":
            found["beta"] = pieces.strength_piece(width, sets, self.beta)
        if isinstance(self.skip, Form):
            found["local"] = pieces.local_piece(heads, value_dim, self._local_taps, backend)
        elif self.skip != "none":
            name = self.skip if self.skip in ("bonus", "late") else "skip"
            found[name] = pieces.skip_piece(self.skip, heads, value_dim, size.features)
        rank = None if isinstance(self.gate_rank, str) else self.gate_rank
        found["output"] = pieces.output_piece(
            self.out_norm, self.out_gate, rank, width, heads, value_dim, backend, size.key_heads
        )
        if self.phi != "none":
            uses = 1 if self.key == "forget" else 2
            found["feature"] = pieces.map_piece(self.phi, size.key_heads, size.key_dim, uses)[1]
        if self.turns:
            found["turn"] = pieces.turn_piece(self.pos, width, size.key_heads, size.channels)
        if self.shift != "none":
            found["shift"] = pieces.shift_piece(self.shift, width, len(self._reads()))
        if self.rule == "dplr":
            found["removal"] = pieces.removal_piece(width, heads, size.features, self.beta)
        if self.decay == "both":
            found["value_decay"] = self._decay_piece(width, sets, value_dim, None)
        if self.in_gate == "sigmoid":
            found["write_gate"] = pieces.write_gate_piece(width, sets)
        elif self.in_gate == "exp":
            found["exp_gate"] = pieces.exp_gate_piece(width, sets, cap)
        if not isinstance(self.value_gate, str):
            found["value_gate"] = pieces.value_gate_piece(self.value_gate, width, sets, value_dim)
        if self.norm == "length":
            found["length_gate"] = pieces.length_piece(sets)
        if self.values == "shared":
            found["blend"] = pieces.blend_piece(width, heads, value_dim)
        if self.key == "latent":
            found["latent"] = Piece(part=lambda: Part(LatentDecay))
        if self.init != "zero" and not self.prefix:
            found["first" if self.init == "learned" else "explored"] = self._first_piece(size)
        if self.levels == "log":
            found["levels"] = pieces.levels_piece(width, heads)
        if isinstance(self.memories, Form):
            count, top_k = (int(each) for each in self.memories.arguments)
            is_shared = self.memories.name == "parts"
            found["memories"] = pieces.memories_piece(width, count, top_k, is_shared)
            if is_shared:
                found["apart"] = pieces.apart_piece(width, size.key_heads * size.key_dim, value_dim)
        return found

    def _decay_piece(self, width: int, heads: int, channels: int | None, cap: float | None) -> Piece:
        given = self.forget.arguments[0] if isinstance(self.forget, Form) else USUAL_TEMPERATURE
        rank = self.rank(width)
        return pieces.decay_piece(
            self.forget_form, float(given), rank, width, heads, channels, self.place, cap
        )

    def _first_piece(self, size: Sizes) -> Piece:
        """The state before the first token, where it is not zero."""
        states = {"heads": size.heads * size.memories, "features": size.rows}
        if self.init == "learned":
            params = size.heads * size.memories * size.rows * size.value_dim
            return Piece(part=lambda: Part(FirstState, **states, value_dim=size.value_dim), params=params)
        columns = size.value_dim + int(self.normalised) + size.beside
        if not isinstance(self.init, Form):
            return Piece(part=lambda: Part(CarriedState, **states, columns=columns))
        given = {"value_dim": size.value_dim, "deviation": float(self.init.arguments[0])}
        return Piece(part=lambda: Part(NoisyState, **states, columns=columns, **given))

    def _prefix_piece(self, width: int, size: Sizes) -> Piece:
        """What the tokens of a prefix write together; its macs are of these tokens alone."""
        if not self.prefix:
            return NOTHING
        keys, values = size.key_heads * size.key_dim, size.heads * size.value_dim
        written = size.heads * size.features * (size.value_dim + int(self.normalised))
        mapped = pieces.map_piece(self.phi, size.key_heads, size.key_dim, 1)[1].macs
        matrices = width * (keys + values)
        given = {"width": width, "length": self.prefix, "keys": keys, "values": values}
        return Piece(
            part=lambda: Part(PrefixState, **given), params=matrices, macs=matrices + mapped + written
        )

    def build(self, width: int, backend: Backend) -> Part:
        size = self.sizes(width)
        if backend == "triton":
            self._check_kernels(size)
        made = self._pieces(width, backend) | {"prefix": self._prefix_piece(width, size)}
        parts = {name: piece.part() for name, piece in made.items() if piece.part is not None}
        function = pieces.map_piece(self.phi, size.key_heads, size.key_dim, 0)[0]
        operation, one_step = self._operation(backend)
        others: dict[str, Any] = {
            "beside": size.beside,
            "copies": size.copies,
            "spread": self.pos == "xpos",
            "act": silu if self.conv == "none" and self.activation == "silu" else None,
            "key": self.key,
            "gated_keys": self.by_channel and self.in_gate in ("tied", "tempered"),
            "tempered_keys": self.in_gate == "tempered",
            "gated_values": self.in_gate == "tied" and self.decay != "channel",
            "floor": self.norm == "max1",
            "lends_values": self.values == "own",
            "crosses": self.values == "context",
            "reads": self._reads() if self.shift != "none" else None,
            "unit_inside": backend == "torch" and self.rule == "delta" and self._is_alone,
            "gates_inside": backend == "torch"
            and self.rule == "add"
            and self._is_alone
            and self._gates_values,
            "divides_inside": backend == "torch"
            and self.norm == "max1"
            and self.out_norm == "group"
            and self.skip == "none"
            and size.value_dim <= MOST_DIVIDED,
            "least": LEAST if self.norm == "denominator" and self.phi_name in SPARSE else 0.0,
        }
        usual = {"key": "own", "spread": False, "beside": 0, "copies": 1, "least": 0.0}
        first = ("conv", "decay", "beta", "skip", "output", "feature")
        others |= {name: part for name, part in parts.items() if name not in first}
        make, decoded = self._decoder(size) if backend == "triton" else (LinearAttention, {})
        return Part(
            make,
            **decoded,
            width=width,
            heads=size.heads,
            key_heads=size.key_heads,
            key_dim=size.key_dim,
            value_dim=size.value_dim,
            features=size.rows,
            scale=size.key_dim**-0.5 if self.scales_queries else 1.0,
            operation=operation,
            one_step=one_step,
            conv=parts.get("conv"),
            theta=10000.0 if self.pos in ("rope", "xpos") else None,
            feature=parts.get("feature") if function is None else function,
            unit_keys=self.unit_keys,
            decay=parts.get("decay"),
            beta=parts.get("beta"),
            dt_values=self.in_gate == "dt",
            normalised=self.normalised,
            skip=parts.get("skip"),
            output=parts["output"],
            **{name: value for name, value in others.items() if value not in (None, False, usual.get(name))},
        )

    @property
    def _is_alone(self) -> bool:
        """Whether nothing else reads or changes what enters the chunked recurrence."""
        is_gated = self.by_channel and self.in_gate in ("tied", "tempered")
        is_plain = self.levels == "one" and self.memories == "none" and self.decay != "both"
        return is_plain and self.skip not in ("bonus", "late") and not is_gated

    @property
    def _gates_values(self) -> bool:
        """Whether values have one gate for each head, or a column of ones."""
        return self.normalised or self.in_gate in ("dt", "sigmoid", "exp", "tied") or self.norm == "length"

    def _check_kernels(self, size: Sizes) -> None:
        """Raise BeyondKernels where no kernel holds the state of a head, and none does without holding it."""
        slots, is_levelled = isinstance(self.rule, Form), self.rule == "delta" and self.levels == "log"
        most = 128 if slots else 256
        if (slots or is_levelled or self.rule == "dplr" or self.decay == "both") and size.features > most:
            genes = "decay=both" if self.decay == "both" else f"rule={self.rule}"
            genes += " and levels=log" if is_levelled else ""
            raise BeyondKernels(
                f"backend='triton' takes at most {most} key channels with {genes}, and this mixer has {size.features} "
                "(mixer linear): give a smaller key_dim, or build with backend='torch'"
            )

    def _operation(self, backend: Backend) -> tuple[Recurrence, Recurrence]:
        """The recurrence over a sequence and over one token."""
        if self.levels == "log":
            return log_linear.form(backend), log_linear.step_form(backend)
        if isinstance(self.rule, Form):
            return slot_attention.form(backend), slot_attention.step_form(backend)
        if self.rule == "second":
            return second_order.form(backend), second_order.step_form(backend)
        if self.rule == "dplr":
            return dplr.form(backend), dplr.step_form(backend)
        if self.decay == "both":
            return twofold_linear.form(backend), twofold_linear.step_form(backend)
        of_sequence = chunked_linear.form(backend, self.rule, self._decay_kind())
        return of_sequence, chunked_linear.step_form(backend)

    def _decoder(self, size: Sizes) -> tuple[type[TokenMixer], dict[str, Any]]:
        """The module whose step is one kernel between its projections, where that kernel takes these genes."""
        is_small = size.key_dim <= 128 and size.value_dim <= 256
        is_known = all(getattr(self, gene) in values for gene, values in TAKES.items())
        is_plain = is_known and (self.conv != "none" or self.activation == "none")
        if not (is_small and is_plain):
            return LinearAttention, {}
        return FusedLinearAttention, {
            "decode": triton_form("linear_decode", "linear_decode_triton"),
            "decay_kind": self.decay,
            "feature_map": self.phi,
            "activation": self.out_gate,
            "is_normed_by_head": self.out_norm == "rms",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Heads (of values), key heads, and the dims of a head.

    channels: key channels after the feature map. features: those of queries and keys, twice as many where an angle
    doubles them. rows: of the state, which are features or slots. beside: its columns beside those of the values.
    memories: states of a head. copies: sets of keys, values and gates that these have.
    """

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    channels: int
    features: int
    rows: int
    beside: int
    memories: int
    copies: int
