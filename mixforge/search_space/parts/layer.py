"""What a token mixer's module is to the model around it: a sequence form, a one-token form, a state between.

A state is a dictionary of tensors whose shapes never change. `step` writes into the tensors it was given, so
that a captured CUDA graph of it can be replayed. Every weight that ends a mixer is called `out`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# What is lent for the tokens of a pass, and of no earlier ones: [B, time, ...].
PER_TOKEN = ("context", "embedding", "values")


@dataclass
class Pass:
    """What the layers of one pass through the model have in common.

    positions_T: int64, the absolute positions of the tokens in this pass (one token in a step).
    start: tokens that came before; for `forward` only, as a step knows its place from `positions_T` alone.
    shared: what layers below have lent, by name: `cache` has the keys and values [B, heads, time, dim] of the last
        attn(kv=own), `context` what the branches beside have said [B, time, D], `embedding` what entered the first
        layer [B, time, D]. See `loans` for the other names and the shapes.
    """

    positions_T: Tensor
    start: int
    shared: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def of_last(self) -> Pass:
        """That of the last token alone, for `step`."""
        shared = {
            name: tuple(each[:, -1:] for each in lent) if name in PER_TOKEN else lent
            for name, lent in self.shared.items()
        }
        return Pass(self.positions_T[-1:], 0, shared)


class TokenMixer(nn.Module):
    """The module of a token mixer. Abstract."""

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The state before the first token, with room for `capacity` tokens."""
        raise NotImplementedError

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """A sequence, after the tokens that `state` has read. Without a state (training) none is returned."""
        raise NotImplementedError

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """One token."""
        raise NotImplementedError

    def between(self, state: dict[str, Tensor], length: int) -> None:
        """What is to be done before token number `length`, from 0, is read by `step`: nothing, for most mixers."""


class Pointwise(TokenMixer):
    """A channel mixer, which sees one token at a time, in the place of a token mixer. It keeps no state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self.inner(x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner(x_BD), state


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., H*K] -> [..., H, K]."""
    return x.reshape(*x.shape[:-1], heads, -1)
