"""Mixture of experts, a channel mixer: a router sends each token through a few of many feed-forward layers.

    y = sum_{i chosen} g_i E_i(x) + gate(x) S(x)

E_i are the routed experts (see `parts.experts` for their forms), S is the `shared` experts, which every token passes,
as one layer of their summed width; gate(x) = sigmoid(w . x) with shared_gate=sigmoid, else 1. How experts are chosen
and weighed and what balances their load stands in `parts.routing`. No token is dropped.

Sources: Shazeer et al. 2017 (arXiv 1701.06538), equations 1 to 5, for top-k gating; Fedus et al. 2021 (arXiv
2101.03961) for the balancing loss; Dai et al. 2024 (arXiv 2401.06066), equations 9 to 11, for narrow and shared
experts; DeepSeek-AI 2024 (arXiv 2412.19437), equations 12 to 16, for score=sigmoid, balance=bias and `scale`;
Yang et al. 2024 (Qwen2, arXiv 2407.10671), section 2.2.2, and its public code for the shared experts' gate. act=clamped
is GPT-OSS's (see `parts.activation`), which also has the biases of bias=all. weights=shared reads the experts of the
nearest owner below, with a router of its own (as UMoE's layers do, Yang et al. 2025, arXiv 2505.07260, section 3.3;
`umoe` is their attention).

Departures: the load is balanced over the tokens of a pass, not over each sequence and not over devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Call, Choice, Form, Real, Whole, replace
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import ClampedSwiglu, geglu, gelu, relu, relu2, silu, swiglu
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.experts import Experts, ExpertWeights, visit_gathered, visit_sorted
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.routing import AttachLoss, Router

# What balance=bias and balance=loss mean without a number: the rate of arXiv 2408.15664 and that of arXiv 2101.03961.
USUAL_RATE = {"bias": 0.001, "loss": 0.01}
# The narrowest expert.
LEAST_EXPAND = NARROWEST / 16


@dataclass(frozen=True, slots=True)
class Moe(Mixer):
    """Mixture of experts. Genes: how many experts, how many of them a token visits, how many every token passes,
    their form and width, and how they are scored, weighed and balanced.
    """

    kind: ClassVar[Literal["token", "channel"]] = "channel"

    experts: Annotated[int, Whole(2, 4096)] = 8
    top_k: Annotated[int, Whole(1, 256)] = 2
    shared: Annotated[int, Whole(0, 256)] = 0
    act: Annotated[
        str | Form,
        Choice("swiglu", "geglu", "gelu", "relu", "relu2", "silu"),
        Call("clamped", Real(0.125, 1024)),
    ] = "swiglu"
    expand: Annotated[int | float | None, Real(LEAST_EXPAND, WIDEST)] = None
    score: Annotated[str, Choice("softmax", "sigmoid")] = "softmax"
    renorm: Annotated[str, Choice("sum", "none")] = "sum"
    scale: Annotated[int | float, Real(0.0625, 64)] = 1
    groups: Annotated[str | Form, Choice("none"), Call("best", Whole(1, 256), Whole(2, 256))] = "none"
    balance: Annotated[
        str | Form, Choice("none", "bias", "loss"), Call("bias", Real(1e-6, 1)), Call("loss", Real(1e-6, 1))
    ] = "none"
    shared_gate: Annotated[str, Choice("none", "sigmoid")] = "none"
    bias: Annotated[str, Choice("none", "all")] = "none"
    weights: Annotated[str, Choice("own", "shared")] = "own"

    @property
    def is_pointwise(self) -> bool:
        # One token takes another form than a sequence, and experts are lent along the pass.
        return False

    @property
    def is_gated(self) -> bool:
        """Whether an expert is a gated unit."""
        return self.act in ("swiglu", "geglu") or isinstance(self.act, Form)

    def hidden(self, width: int) -> int:
        """Hidden width of one expert."""
        if self.expand is None:
            return 8 * math.ceil(width / 3) if self.is_gated else 4 * width
        return hidden_width(self.expand, width)

    def kept_groups(self) -> tuple[int, int] | None:
        """How many groups the experts are in, and how many of them a token may visit."""
        if not isinstance(self.groups, Form):
            return None
        kept, groups = self.groups.arguments
        return int(groups), int(kept)

    def why_illegal(self, width: int) -> str | None:
        if self.top_k > self.experts:
            return f"top_k {self.top_k} is more than the {self.experts} experts (mixer moe)"
        if self.top_k == 1 and self.renorm == "sum":
            return "top_k=1 with renorm=sum weighs every expert 1, so that its router learns nothing; say renorm=none"
        limits = self.kept_groups()
        if limits is not None:
            groups, kept = limits
            if self.experts % groups != 0 or kept > groups:
                return (
                    f"groups={self.groups} takes {kept} of {groups} groups of {self.experts} experts (mixer moe); "
                    "the groups must divide the experts and be no fewer than those taken"
                )
            if kept * self.experts // groups < self.top_k:
                return (
                    f"groups={self.groups} leaves {kept * self.experts // groups} experts to choose "
                    f"top_k {self.top_k} from (mixer moe)"
                )
        return None

    def canonical(self, width: int) -> Self:
        limits = self.kept_groups()
        expand = None if self.expand is None else shortest_expand(self.expand, width, LEAST_EXPAND)
        if self.hidden(width) == replace(self, expand=None).hidden(width):
            expand = None
        balance = self.balance
        if isinstance(balance, Form) and balance.arguments == (USUAL_RATE[balance.name],):
            balance = balance.name
        if self.top_k == self.experts:
            # Every expert has every token.
            balance = "none"
        return replace(
            self,
            expand=expand,
            scale=int(self.scale) if float(self.scale).is_integer() else self.scale,
            groups="none" if limits is not None and limits[0] == limits[1] else self.groups,
            balance=balance,
            shared_gate="none" if self.shared == 0 else self.shared_gate,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        if self.weights == "shared":
            raise ValueError("moe(weights=shared) has no channels to give away; give it no factor inside '|'")
        hidden = self.hidden(width) * share
        if hidden.denominator != 1:
            raise ValueError(
                f"a share of {share} does not divide the hidden width {self.hidden(width)} of an expert"
            )
        return replace(self, expand=int(hidden) / width).canonical(width)

    def lends(self, width: int) -> Mapping[str, Loan]:
        return {"experts": self._loan(width)} if self.weights == "own" else {}

    def borrows(self, width: int) -> Mapping[str, Loan]:
        return (
            {"experts": dataclasses.replace(self._loan(width), read=self.top_k)}
            if self.weights == "shared"
            else {}
        )

    def _loan(self, width: int) -> Loan:
        hidden = self.hidden(width)
        rows = 2 * hidden if self.is_gated else hidden
        shapes = ((self.experts, rows, width), (self.experts, width, hidden))
        biases = ((self.experts, rows), (self.experts, width)) if self.bias == "all" else ()
        return Loan("weights", (*shapes, *biases))

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        hidden = self.hidden(width)
        rows = 2 * hidden if self.is_gated else hidden
        has_bias = 1 if self.bias == "all" else 0
        router = width * self.experts
        one = width * (rows + hidden)
        one_bias = has_bias * (rows + width)
        shared = self.shared * one + (width if self.shared and self.shared_gate == "sigmoid" else 0)
        shared_bias = has_bias * (self.shared * rows + width) if self.shared > 0 else 0
        own = self.weights == "own"
        common = router + has_bias * self.experts + shared + shared_bias
        return Cost(
            params=common + (self.experts * (one + one_bias) if own else 0),
            flops=2 * length * (router + self.top_k * one + shared),
            state_bytes=0,
            decode_bytes=(common + self.top_k * (one + one_bias)) * itemsize,
            idle_params=(self.experts - self.top_k) * (one + one_bias) if own else 0,
        )

    def build(self, width: int, backend: Backend) -> Part:
        form = self.balance if isinstance(self.balance, str) else self.balance.name
        rate = self.balance.arguments[0] if isinstance(self.balance, Form) else USUAL_RATE.get(form, 0.0)
        has_bias = self.bias == "all"
        limits = self.kept_groups()
        act = _activation(self.act)
        router = Part(
            Router,
            width=width,
            experts=self.experts,
            top_k=self.top_k,
            score=self.score,
            renorm=self.renorm == "sum",
            scale=self.scale,
            groups=limits,
            balance=form,
            rate=rate,
            logit_bias=has_bias,
        )
        shape = {"width": width, "gated": self.is_gated, "bias": has_bias}
        hidden = self.hidden(width)
        experts = (
            Part(Experts, experts=self.experts, hidden=hidden, **shape) if self.weights == "own" else None
        )
        shared = Part(SharedExperts, hidden=self.shared * hidden, act=act, **shape) if self.shared else None
        return Part(
            MixtureOfExperts,
            router=router,
            experts=experts,
            act=act,
            gated=self.is_gated,
            shared=shared,
            shared_gate=Part(Dense, in_features=width, out_features=1, bias=False)
            if self.shared and self.shared_gate == "sigmoid"
            else None,
        )


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
    "silu": silu,
}


def _activation(act: str | Form) -> Part | Callable[..., Tensor]:
    return Part(ClampedSwiglu, limit=act.arguments[0]) if isinstance(act, Form) else _ACTIVATIONS[act]


class SharedExperts(nn.Module):
    """The experts that every token passes, as one layer: [..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int, act: Callable[..., Tensor], gated: bool, bias: bool) -> None:
        super().__init__()
        self.act = act
        self.gated = gated
        self.up = Dense(width, 2 * hidden if gated else hidden, bias=bias)
        self.out = Dense(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.out(self.act(*h.chunk(2, -1)) if self.gated else self.act(h))
        return y


class MixtureOfExperts(TokenMixer):
    """[B, T, D] -> [B, T, D]. It keeps no state; its experts go along the pass, for layers that share them."""

    def __init__(
        self,
        router: Router,
        experts: Experts | None,
        act: Callable[..., Tensor],
        gated: bool,
        shared: SharedExperts | None,
        shared_gate: nn.Linear | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.act = act
        self.gated = gated
        self.shared = shared
        self.shared_gate = shared_gate

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        x_MD = x_BTD.flatten(0, 1)
        weight_MA, index_MA, loss = self.router(x_MD)
        y_MAD = visit_sorted(x_MD, index_MA, self._weights(at), self.act, self.gated)
        y_BTD = self._mixed(y_MAD, weight_MA, x_MD).view_as(x_BTD)
        if loss is not None:
            y_BTD = AttachLoss.apply(y_BTD, loss)  # type: ignore[no-untyped-call]
        return y_BTD, state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        weight_BA, index_BA, _ = self.router(x_BD)
        y_BAD = visit_gathered(x_BD, index_BA, self._weights(at), self.act, self.gated)
        return self._mixed(y_BAD, weight_BA, x_BD), state

    def _weights(self, at: Pass) -> ExpertWeights:
        """Its own, which later layers may read from here on, or those of the nearest owner below."""
        if self.experts is not None:
            at.shared["experts"] = self.experts.lent()
        return ExpertWeights(*at.shared["experts"])

    def _mixed(self, y_MAD: Tensor, weight_MA: Tensor, x_MD: Tensor) -> Tensor:
        y_MD = (y_MAD * weight_MA[..., None].to(y_MAD.dtype)).sum(1)
        if self.shared is None:
            return y_MD
        shared_MD: Tensor = self.shared(x_MD)
        if self.shared_gate is not None:
            shared_MD = torch.sigmoid(self.shared_gate(x_MD)) * shared_MD
        return y_MD + shared_MD
