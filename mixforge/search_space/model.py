"""The language model: embedding, a stack of residual units, a last norm and the head.

`language_model` writes an architecture down as a `Part`; `build` makes it, with seeded weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.architecture import Architecture, Layer, Reuse, Unit
from mixforge.search_space.architecture import Beside as BesideUnit
from mixforge.search_space.mixer import BACKENDS, Backend, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.beside import Beside, ConcatFuse, GateFuse, MeanFuse, SumFuse
from mixforge.search_space.parts.layer import Pass, Pointwise
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.residual import Residual, Stack
from mixforge.search_space.stack import mixers


@dataclass
class State:
    """Everything that decoding keeps: caches, recurrent states and the place in the sequence.

    length: tokens read so far, on the host. capacity: tokens that the caches have room for.
    position: int64 [1] on the device, equal to `length`. layers: a dictionary for each application of a unit.
    """

    length: int
    capacity: int
    position: Tensor
    layers: list[dict[str, Tensor]]


class LanguageModel(nn.Module):
    """tokens [B, T] -> logits [B, T, X]; token t sees tokens 0 to t."""

    def __init__(
        self,
        vocab: int,
        width: int,
        tied: bool,
        stack: Stack,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.width = width
        self.embedding = nn.Embedding(vocab, width)
        self.stack = stack
        self.norm = norm
        self.readout = None if tied else nn.Linear(width, vocab, bias=False)
        # Logits of unit variance. At widths of 64 and 128 and few steps this learns faster than the usual 0.02.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if self.readout is not None:
            nn.init.normal_(self.readout.weight, std=width**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 tokens of any shape [...] -> [..., D]."""
        return F.embedding(tokens, self.embedding.weight)

    def body(self, x_BTD: Tensor) -> Tensor:
        """The stack over whole sequences, for training: [B, T, D] -> [B, T, D]."""
        at = Pass(torch.arange(x_BTD.shape[1], device=x_BTD.device), 0)
        y_BTD: Tensor = self.stack(x_BTD, None, at)[0]
        return y_BTD

    def head(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., X]."""
        return F.linear(self.norm(x), self.read_weight())

    def read_weight(self) -> Tensor:
        """[X, D], of which logits are products with what the last norm gives."""
        return (self.embedding if self.readout is None else self.readout).weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 tokens [B, T] -> logits [B, T, X]."""
        return self.head(self.body(self.embed(tokens_BT)))

    def initial_state(self, batch: int, capacity: int) -> State:
        """An empty state with room for `capacity` tokens, on the model's device and in its dtype."""
        weight = self.embedding.weight
        layers = self.stack.initial_states(batch, capacity, weight.device, weight.dtype)
        return State(0, capacity, torch.zeros(1, dtype=torch.int64, device=weight.device), layers)

    @torch.no_grad()
    def prefill(
        self, tokens_BT: Tensor, state: State | None = None, capacity: int | None = None
    ) -> tuple[Tensor, State]:
        """Read tokens [B, T], after those that `state` has read. Returns (logits of the last token [B, X],
        state).

        A new state has room for `capacity` tokens, which is twice the prompt unless it is given. The state
        that was passed in may be overwritten. Raises ValueError where the tokens do not fit.
        """
        batch, length = tokens_BT.shape
        if length == 0:
            raise ValueError("there is nothing to read: prefill takes at least one token")
        if state is None:
            state = self.initial_state(batch, 2 * length if capacity is None else capacity)
        end = state.length + length
        if end > state.capacity:
            raise ValueError(
                f"{length} tokens after {state.length} do not fit a state with room for {state.capacity}; "
                f"start with prefill(tokens, capacity={end}) or more"
            )
        at = Pass(torch.arange(state.length, end, device=tokens_BT.device), state.length)
        x_BTD, layers = self.stack(self.embed(tokens_BT), state.layers, at)
        return self.head(x_BTD[:, -1]), State(end, state.capacity, state.position + length, layers)

    @torch.no_grad()
    def step(self, token_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one more token [B]. Returns (logits [B, X], state). The state that was passed in is
        overwritten.

        Raises ValueError where the state is full.
        """
        if state.length >= state.capacity:
            raise ValueError(
                f"the state is full at {state.capacity} tokens; start with "
                f"prefill(tokens, capacity=...) or initial_state(batch, capacity) of more"
            )
        logits_BX, layers = self.advance(token_B, state.position, state.layers)
        return logits_BX, State(state.length + 1, state.capacity, state.position.add_(1), layers)

    def advance(
        self, token_B: Tensor, position: Tensor, layers: list[dict[str, Tensor]]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The device work of a step. Nothing in it depends on a value of the host: a graph can capture it."""
        x_BD, layers = self.stack.step(self.embed(token_B), layers, Pass(position, 0))
        return self.head(x_BD), layers


def language_model(architecture: Architecture, backend: Backend) -> Part:
    """The model as a part. Raises ValueError where it is illegal or the backend cannot run it."""
    reason = architecture.why_illegal()
    if reason is not None:
        raise ValueError(reason)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return Part(
        LanguageModel,
        vocab=architecture.vocab,
        width=architecture.width,
        tied=architecture.embed == "tied",
        stack=_Assembly(architecture, backend).stack(),
        norm=_norm_part(architecture, backend),
    )


class _Assembly:
    """The parts of one architecture's stack; it tells each mixer which of the layers of its kind it is."""

    def __init__(self, architecture: Architecture, backend: Backend) -> None:
        self.architecture = architecture
        self.backend = backend
        self.counts = Counter(type(mixer) for mixer in mixers(architecture.stack))
        self.seen = Counter[type[Mixer]]()

    def stack(self) -> Part:
        return Part(Stack, units=[self.unit(unit) for unit in self.architecture.stack])

    def unit(self, unit: Unit) -> Part:
        if isinstance(unit, Reuse):
            return Part(Stack, units=[self.unit(each) for each in unit.body], times=unit.times)
        places = {"pre": ("before",), "post": ("after",), "sandwich": ("before", "inside")}[
            self.architecture.place
        ]
        norms = {
            place: _norm_part(self.architecture, self.backend) if place in places else Part(nn.Identity)
            for place in ("before", "inside", "after")
        }
        return Part(Residual, mixer=self.branches(unit), **norms)

    def branches(self, unit: Layer | BesideUnit) -> Part:
        """The function of a residual unit: one mixer, or several beside one another."""
        if isinstance(unit, Layer):
            return self.mixer(unit.mixer)
        width = self.architecture.width
        branches = [self.mixer(mixer) for mixer in unit.branches]
        fuses = {"gate": GateFuse, "concat": ConcatFuse}
        if unit.fuse == "mean":
            fuse = Part(MeanFuse, norms=[norm_part(width, self.backend) for _ in branches])
        elif unit.fuse == "sum":
            fuse = Part(SumFuse)
        else:
            fuse = Part(fuses[unit.fuse], width=width, branches=len(branches))
        return Part(Beside, branches=branches, fuse=fuse)

    def mixer(self, mixer: Mixer) -> Part:
        placed = mixer.placed(self.seen[type(mixer)], self.counts[type(mixer)])
        self.seen[type(mixer)] += 1
        part = placed.build(self.architecture.width, self.backend)
        return Part(Pointwise, inner=part) if mixer.is_pointwise else part


def _norm_part(architecture: Architecture, backend: Backend) -> Part:
    if architecture.norm == "layer":
        return Part(nn.LayerNorm, normalized_shape=architecture.width)
    return norm_part(architecture.width, backend)


def build(
    architecture: Architecture,
    backend: Backend = "torch",
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The model with weights drawn from `seed`: the same on every device, and the global generators left
    alone.

    The weights that end a residual branch are divided by the square root of the number of branches, so that
    the residual stream of a deep stack starts as small as that of a shallow one (Radford et al. 2019, GPT-2,
    section 2.3). The model is in evaluation mode; call `train()` before training
    it. Raises ValueError where the architecture is illegal or the backend cannot run it.
    """
    part = language_model(architecture, backend)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: LanguageModel = part.build()
        shrink = 1 / math.sqrt(architecture.depth)
        for name, weight in model.stack.named_parameters():
            # A norm at the end of a branch would undo what is done to the weights before it.
            if name.endswith((".out.weight", ".inside.weight")) or ".fuse.norms." in name:
                weight.mul_(shrink)
    return model.to(device=torch.device(device), dtype=dtype).eval()
