"""Linear attention and state-space duality: a recurrence whose state is a matrix, one for each head.

    S <- D_t S_{t-1}                                                  decay
    S_t = S + k_t v_t^T                                               rule=add
    S_t = S + k_t (beta_t (v_t - S^T k_t))^T                          rule=delta
    o_t = S_t^T q_t

Decay D_t:
    none      1
    head      gamma_h = 1 - 2^(-5-h), fixed (Sun et al. 2023, arXiv 2307.08621, equation 8)
    scalar    one number for each token and head
    channel   one number for each token, head and key channel
  with, for scalar and channel, where W is of low rank for channel,
    forget=softplus   log D_t = -exp(a_h) dt_t, dt_t = softplus(W x_t + b)
                      (Gu and Dao 2023, arXiv 2312.00752, algorithm 2)
    forget=sigmoid    log D_t = log sigmoid(W x_t + b) / 16 (Yang et al. 2023, arXiv 2312.06635, section 4.4)
Queries, keys: projection, short convolution with SiLU (`conv`), rotation (`pos=rope`), feature map, L2 norm.
    phi=elu1      elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, equation 7)
    phi=relu      max(x, 0) (Kasai et al. 2021, arXiv 2103.13076, without its learned map)
    phi=taylor(2) phi(q) . phi(k) = 1 + q.k/sqrt(K) + (q.k)^2/(2K) (Arora et al. 2024, arXiv 2402.18668)
Queries are divided by sqrt(K), but for phi=taylor(2), which scales itself, and for in_gate=dt, whose paper
does not scale. Values: projection, short convolution with SiLU; times dt_t with in_gate=dt.
beta_t = `beta` sigmoid(W x_t); beta=2 reaches negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537).
norm=denominator divides o_t by q_t . z_t, where z_t is the same recurrence over ones in place of values.
skip=head adds d_h v_t to o_t, v_t before dt. out_gate multiplies o_t by silu(W x) or sigmoid(W x).
out_norm=rms normalises each head before the gate; out_norm=gated, all heads at once after the gate.

The named points, and where they depart from their papers. None has biases in its projections and its
convolution; sizes of heads are genes, not equations.
  retnet    Sun et al. 2023 (arXiv 2307.08621), equations 6 to 8. The norm of a head is RMS with a learned
            scale; the frequencies are those of rotary position; outputs are not divided by a sum of decays.
  gla       Yang et al. 2023 (arXiv 2312.06635), section 4.4. RMS norm in the place of layer norm.
  deltanet  Yang et al. 2024 (arXiv 2406.06484), section 3.4.
  gdn       Yang et al. 2024 (arXiv 2412.06464), equation 10. Values are as wide as keys.
  kda       Kimi Team 2025 (arXiv 2510.26692), section 3. The output gate has full rank; log D_t >= -5.
  mamba2    Dao and Gu 2024 (arXiv 2405.21060), section 7. P = 2 width/heads and N = 64.
  based     The linear layer of Arora et al. 2024 (arXiv 2402.18668). Each product k_i k_j, i != j, is kept
            once, weighed by sqrt(2), and not twice: the same function with about half the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from mixforge.kernels import chunked_linear, short_conv
from mixforge.kernels.backend import triton_form
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Whole
from mixforge.search_space.heads import default_heads, heads_that_divide, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import relu, sigmoid, silu
from mixforge.search_space.parts.decay import (
    HeadDecay,
    SigmoidChannelDecay,
    SigmoidDecay,
    SoftplusChannelDecay,
    SoftplusDecay,
)
from mixforge.search_space.parts.feature_map import elu1, taylor, taylor_features
from mixforge.search_space.parts.layer import TokenMixer
from mixforge.search_space.parts.linear_attention import LinearAttention
from mixforge.search_space.parts.linear_decode import FusedLinearAttention
from mixforge.search_space.parts.linear_output import GatedOutput, HeadSkip, NormedOutput
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.write_strength import WriteStrength

# Rank of W in forget=sigmoid with decay=channel, as in the paper. With forget=softplus it is the value dim.
SIGMOID_RANK = 16
TAYLOR = Form("taylor", (2,))


@dataclass(frozen=True, slots=True)
class Linear(Mixer):
    """The linear family. A gene that has no effect is dropped from the canonical form."""

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "retnet": {"decay": "head", "pos": "rope", "conv": "none", "value_dim": "double"},
        "gla": {"decay": "channel", "forget": "sigmoid", "conv": "none", "key_dim": "half"},
        "deltanet": {"rule": "delta", "out_gate": "none"},
        "gdn": {"rule": "delta", "decay": "scalar"},
        "kda": {"rule": "delta", "decay": "channel", "out_gate": "sigmoid"},
        "mamba2": {
            "decay": "scalar",
            "in_gate": "dt",
            "skip": "head",
            "out_norm": "gated",
            "key_heads": 1,
            "key_dim": 64,
            "value_dim": "double",
        },
        "based": {
            "phi": TAYLOR,
            "norm": "denominator",
            "key_dim": 16,
            "conv": "none",
            "out_norm": "none",
            "out_gate": "none",
        },
    }

    rule: Annotated[str, Choice("add", "delta")] = "add"
    decay: Annotated[str, Choice("none", "head", "scalar", "channel")] = "none"
    forget: Annotated[str, Choice("softplus", "sigmoid")] = "softplus"
    phi: Annotated[str | Form, Choice("none", "elu1", "relu"), Call("taylor", Whole(2, 2))] = "none"
    norm: Annotated[str, Choice("none", "denominator")] = "none"
    qk_norm: Annotated[str | None, Choice("none", "l2")] = None
    beta: Annotated[int, Whole(1, 2)] = 1
    conv: Annotated[str | int, Choice("none"), Whole(2, 8)] = 4
    pos: Annotated[str, Choice("none", "rope")] = "none"
    in_gate: Annotated[str, Choice("none", "dt")] = "none"
    skip: Annotated[str, Choice("none", "head")] = "none"
    out_norm: Annotated[str, Choice("rms", "gated", "none")] = "rms"
    out_gate: Annotated[str, Choice("silu", "sigmoid", "none")] = "silu"
    heads: Annotated[int | None, Whole(1, 256)] = None
    key_heads: Annotated[int | None, Whole(1, 256)] = None
    key_dim: Annotated[int | str | None, Choice("half"), Whole(1, 1024)] = None
    value_dim: Annotated[int | str | None, Choice("double"), Whole(1, 1024)] = None

    def sizes(self, width: int) -> Sizes:
        """Heads and their dims at this width."""
        heads = default_heads(width) if self.heads is None else self.heads
        usual = max(1, width // heads)
        key_dim = (
            usual if self.key_dim is None else max(1, usual // 2) if self.key_dim == "half" else self.key_dim
        )
        value_dim = (
            usual if self.value_dim is None else 2 * usual if self.value_dim == "double" else self.value_dim
        )
        return Sizes(
            heads=heads,
            key_heads=heads if self.key_heads is None else self.key_heads,
            key_dim=int(key_dim),
            value_dim=int(value_dim),
            features=taylor_features(int(key_dim)) if self.phi == TAYLOR else int(key_dim),
        )

    @property
    def unit_keys(self) -> bool:
        """Whether queries and keys have length 1."""
        return self.rule == "delta" if self.qk_norm is None else self.qk_norm == "l2"

    @property
    def gated_decay(self) -> bool:
        """Whether the decay follows from the input."""
        return self.decay in ("scalar", "channel")

    def why_illegal(self, width: int) -> str | None:
        size = self.sizes(width)
        follows = isinstance(self.key_dim, str | None) or isinstance(self.value_dim, str | None)
        if follows and width % size.heads != 0:
            return (
                f"heads {size.heads} does not divide width {width} (mixer linear); "
                f"legal heads: {heads_that_divide(width)}, or say key_dim and value_dim"
            )
        if size.heads % size.key_heads != 0:
            return f"{size.key_heads} key heads do not divide {size.heads} heads (mixer linear)"
        if self.key_dim == "half" and (width // size.heads) % 2 != 0:
            return f"key_dim=half needs an even width for each head, not {width // size.heads} (mixer linear)"
        if self.pos == "rope" and size.key_dim % 2 != 0:
            return f"pos=rope needs an even key_dim, not {size.key_dim} (mixer linear)"
        if self.rule == "delta" and not self.unit_keys:
            return "rule=delta needs keys of length 1: leave qk_norm out or say qk_norm=l2 (mixer linear)"
        if self.norm == "denominator" and self.rule == "delta":
            return (
                "norm=denominator needs rule=add: under rule=delta the sum of weights may be 0 (mixer linear)"
            )
        if self.norm == "denominator" and self.phi == "none":
            return "norm=denominator needs positive features: phi=elu1, relu or taylor(2) (mixer linear)"
        if self.in_gate == "dt" and (self.decay != "scalar" or self.forget != "softplus"):
            return "in_gate=dt needs the dt of decay=scalar, forget=softplus (mixer linear)"
        return None

    def canonical(self, width: int) -> Self:
        size = self.sizes(width)
        usual = width // size.heads
        divides = width % size.heads == 0
        key_dim, value_dim = self.key_dim, self.value_dim
        if divides and isinstance(key_dim, int):
            key_dim = None if key_dim == usual else "half" if 2 * key_dim == usual else key_dim
        if divides and isinstance(value_dim, int):
            value_dim = None if value_dim == usual else "double" if value_dim == 2 * usual else value_dim
        return replace(
            self,
            forget=self.forget if self.gated_decay else "softplus",
            qk_norm=None if self.unit_keys == (self.rule == "delta") else self.qk_norm,
            beta=self.beta if self.rule == "delta" else 1,
            heads=None if size.heads == default_heads(width) else size.heads,
            key_heads=None if size.key_heads == size.heads else size.key_heads,
            key_dim=key_dim,
            value_dim=value_dim,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        size = self.sizes(width)
        heads = shared_heads("linear", size.heads, share)
        key_heads = 1 if size.key_heads == 1 else shared_heads("linear's keys", size.key_heads, share)
        return replace(
            self, heads=heads, key_heads=key_heads, key_dim=size.key_dim, value_dim=size.value_dim
        ).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        size = self.sizes(width)
        mixed = 2 * size.key_heads * size.key_dim + size.heads * size.value_dim
        inner = size.heads * size.value_dim
        gates = inner if self.out_gate != "none" else 0
        matrices = width * (mixed + gates + inner)
        matrices += width * size.heads if self.rule == "delta" else 0
        vectors = 0
        if self.decay == "scalar":
            matrices += width * size.heads
            vectors += size.heads * (2 if self.forget == "softplus" else 1)
        if self.decay == "channel":
            rank, rates = self.rank(width), size.heads * size.features
            matrices += rank * (width + rates)
            vectors += rates + (size.heads if self.forget == "softplus" else 0)
        vectors += size.heads if self.skip == "head" else 0
        vectors += {"rms": size.value_dim, "gated": inner, "none": 0}[self.out_norm]
        taps = 0 if isinstance(self.conv, str) else self.conv
        params = matrices + vectors + mixed * taps
        matrix_values = (
            size.heads * size.features * (size.value_dim + (1 if self.norm == "denominator" else 0))
        )
        state = 4 * matrix_values + mixed * max(0, taps - 1) * itemsize
        flops = chunked_linear.matmul_flops(
            length,
            key_heads=size.key_heads,
            value_heads=size.heads,
            key_dim=size.features,
            value_dim=size.value_dim + (1 if self.norm == "denominator" else 0),
            rule=self.rule,
            decay=self.decay,
        )
        return Cost(
            params=params,
            flops=2 * length * (matrices + mixed * taps) + flops,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def rank(self, width: int) -> int:
        """Rank of the projection that makes a channel's decay."""
        return SIGMOID_RANK if self.forget == "sigmoid" else self.sizes(width).value_dim

    def build(self, width: int, backend: Backend) -> Part:
        size = self.sizes(width)
        if backend == "triton" and size.features > 256:
            raise ValueError(
                f"backend='triton' takes at most 256 key channels, and this mixer has {size.features} (mixer linear): "
                "give a smaller key_dim, or build with backend='torch'"
            )
        inner = size.heads * size.value_dim
        mixed = 2 * size.key_heads * size.key_dim + inner
        norm = {
            "rms": norm_part(size.value_dim, backend),
            "gated": norm_part(inner, backend),
            "none": None,
        }[self.out_norm]
        make, decoded = self._decoder(size) if backend == "triton" else (LinearAttention, {})
        return Part(
            make,
            **decoded,
            width=width,
            heads=size.heads,
            key_heads=size.key_heads,
            key_dim=size.key_dim,
            value_dim=size.value_dim,
            features=size.features,
            scale=1.0 if self.phi == TAYLOR or self.in_gate == "dt" else size.key_dim**-0.5,
            operation=chunked_linear.form(backend, self.rule, self.decay),
            one_step=chunked_linear.step_form(backend),
            conv=None
            if isinstance(self.conv, str)
            else Part(
                ShortConvolution,
                channels=mixed,
                size=self.conv,
                activation="silu",
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
            ),
            theta=10000.0 if self.pos == "rope" else None,
            feature=_FEATURES[str(self.phi)],
            unit_keys=self.unit_keys,
            decay=self._decay_part(width, size),
            beta=Part(WriteStrength, width=width, heads=size.heads, most=self.beta)
            if self.rule == "delta"
            else None,
            dt_values=self.in_gate == "dt",
            normalised=self.norm == "denominator",
            skip=Part(HeadSkip, heads=size.heads) if self.skip == "head" else None,
            output=Part(
                GatedOutput if self.out_norm == "gated" else NormedOutput,
                width=width,
                heads=size.heads,
                value_dim=size.value_dim,
                norm=norm,
                activation=_ACTIVATIONS[self.out_gate],
            ),
        )

    def _decoder(self, size: Sizes) -> tuple[type[TokenMixer], dict[str, Any]]:
        """The module whose step is one kernel between its projections, where that kernel takes these genes."""
        is_small = size.key_dim <= 128 and size.value_dim <= 256
        is_plain = self.phi in ("none", "elu1", "relu") and self.norm == "none" and self.pos == "none"
        if not (is_small and is_plain):
            return LinearAttention, {}
        return FusedLinearAttention, {
            "decode": triton_form("linear_decode", "linear_decode_triton"),
            "decay_kind": self.decay,
            "feature_map": self.phi,
            "activation": self.out_gate,
            "is_normed_by_head": self.out_norm == "rms",
        }

    def _decay_part(self, width: int, size: Sizes) -> Part | None:
        match self.decay, self.forget:
            case "none", _:
                return None
            case "head", _:
                return Part(HeadDecay, heads=size.heads)
            case "scalar", "softplus":
                return Part(SoftplusDecay, width=width, heads=size.heads)
            case "scalar", _:
                return Part(SigmoidDecay, width=width, heads=size.heads)
        rank = self.rank(width)
        make = SoftplusChannelDecay if self.forget == "softplus" else SigmoidChannelDecay
        return Part(make, width=width, heads=size.heads, channels=size.features, rank=rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Heads (of values), key heads, and the dims of a head; features: key channels after the feature map."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    features: int


_FEATURES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "elu1": elu1,
    "relu": relu,
    "taylor(2)": taylor,
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"silu": silu, "sigmoid": sigmoid, "none": None}
