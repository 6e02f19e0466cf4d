"""The linear family's mixer with one kernel for what a step does between its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixforge.search_space.genes import GeneValue
from mixforge.search_space.parts.decay import (
    SigmoidChannelDecay,
    SigmoidDecay,
    SoftplusChannelDecay,
    SoftplusDecay,
)
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.linear_attention import LinearAttention

# The values of genes that the kernel takes; it does not look at the others.
TAKES: dict[str, tuple[GeneValue, ...]] = {
    "rule": ("add", "delta"),
    "memories": ("none",),
    "levels": ("one",),
    "decay": ("none", "head", "scalar", "channel"),
    "forget": ("softplus", "sigmoid"),
    "key": ("own",),
    "phi": ("none", "elu1", "relu"),
    "norm": ("none",),
    "pos": ("none",),
    "in_gate": ("none", "dt"),
    "gate_cap": ("none",),
    "value_gate": ("none",),
    "values": ("plain",),
    "shift": ("none",),
    "skip": ("none", "head"),
    "out_norm": ("rms", "gated", "none"),
    "out_gate": ("silu", "sigmoid", "none"),
}


class FusedLinearAttention(LinearAttention):
    """As its base; a step without gradients runs `decode`, of `kernels/linear_decode_triton`."""

    def __init__(
        self,
        decode: Callable[..., Tensor],
        decay_kind: str,
        feature_map: str,
        activation: str,
        is_normed_by_head: bool,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.decode = decode
        self.decay_kind = decay_kind
        self.feature_map = feature_map
        self.activation = activation
        self.is_normed_by_head = is_normed_by_head

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.is_grad_enabled():
            return super().step(x_BD, state, at)
        mixed_BF = self.mixed(x_BD)
        if self.conv is not None:
            mixed_BF = self.conv.step(mixed_BF, state["conv"])
        # Modules whose attributes the base says nothing of.
        output: Any = self.output
        beta: Any = self.beta
        norm = output.norm if self.is_normed_by_head else None
        y_BF = self.decode(
            mixed_BF,
            *decay_logits(self.decay, x_BD),
            None if beta is None else beta.logit(x_BD),
            None if output.gate is None else output.gate(x_BD),
            None if self.skip is None else self.skip.weight,
            None if norm is None else norm.weight,
            state["matrix"],
            self.key_heads,
            self.decay_kind,
            1.0 if beta is None else float(beta.most),
            self.feature_map,
            self.unit_keys,
            self.scale,
            self.dt_values,
            self.activation,
            0.0 if norm is None else norm.eps,
        )
        if output.norm is not None and norm is None:
            y_BF = output.norm(y_BF)
        y_BD: Tensor = output.out(y_BF)
        return y_BD, state


def decay_logits(decay: nn.Module | None, x_BD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a decay makes its logarithm of: the logits, their bias and the rate, as far as there are any."""
    match decay:
        case SoftplusDecay():
            return decay.step_size(x_BD), decay.bias, decay.rate
        case SoftplusChannelDecay():
            return decay.up(decay.down(x_BD)), decay.bias, decay.rate
        case SigmoidDecay():
            return decay.logit(x_BD), None, None
        case SigmoidChannelDecay():
            return decay.up(decay.down(x_BD)), None, None
    return None, None, None
