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

from mixforge.kernels.dense import dense
from mixforge.search_space.architecture import Architecture, Layer, Reuse, Segment
from mixforge.search_space.architecture import Beside as BesideUnit
from mixforge.search_space.architecture import Residual as ResidualUnit
from mixforge.search_space.architecture import Unit as StackUnit
from mixforge.search_space.genes import Form
from mixforge.search_space.heads import default_heads
from mixforge.search_space.mixer import BACKENDS, Backend, Mixer
from mixforge.search_space.on_meta import on_meta
from mixforge.search_space.part import Part
from mixforge.search_space.parts.associative_segment import AssociativeBlock, AssociativeSegments
from mixforge.search_space.parts.beside import (
    Beside,
    ConcatFuse,
    GateFuse,
    MeanFuse,
    NormedFuse,
    ReadFuse,
    ScalarFuse,
    SumFuse,
)
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.halting import Halting, Recurrence, TimeSignal
from mixforge.search_space.parts.layer import Pass, Pointwise
from mixforge.search_space.parts.norm import RMSNorm, SimpleRMSNorm, norm_part
from mixforge.search_space.parts.progressive_norm import ProgressiveNorm
from mixforge.search_space.parts.residual import Branch, Residual, ResidualStack, Stack, StreamGate, Unit
from mixforge.search_space.parts.segment import SegmentStack
from mixforge.search_space.parts.shortcut import DepthAttention, DepthAverage, ShortcutStack
from mixforge.search_space.parts.sigma import with_sigma
from mixforge.search_space.scaling import BASE, output_scale, rate_factors
from mixforge.search_space.stack import mixers, norms_input


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
    """tokens [B, T] -> logits [B, T, X]; token t sees tokens 0 to t.

    With a prefix it sees tokens 0 to max(t, prefix - 1): the first `prefix` tokens are read together, so that the logits
    before the last of them may know the next token and say nothing of the model. They are those of the first `prefill`
    into an empty state, at most; without one, and in all that follows, no token sees a later one.

    rate_factors: what the learning rate of a weight is multiplied by in training, by its name, where it is not 1.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        tied: bool,
        stack: Unit,
        norm: nn.Module,
        embed_scale: float = 1.0,
        softcap: float | None = None,
        output_scale: float = 1.0,
        row_scale: float | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.output_scale = output_scale
        self.rate_factors: dict[str, float] = {}
        self.embed_scale = embed_scale
        self.softcap = softcap
        self.vocab = vocab
        self.width = width
        self.embedding = nn.Embedding(vocab, width)
        self.stack = stack
        self.norm = norm
        self.readout = None if tied else Dense(width, vocab, bias=False)
        # Logits of unit variance. At widths of 64 and 128 and few steps this learns faster than the usual 0.02.
        scale = width**-0.5 if row_scale is None else row_scale
        nn.init.normal_(self.embedding.weight, std=scale)
        if self.readout is not None:
            nn.init.normal_(self.readout.weight, std=scale)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 tokens of any shape [...] -> [..., D]."""
        x = F.embedding(tokens, self.embedding.weight)
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def body(self, x_BTD: Tensor) -> Tensor:
        """The stack over whole sequences, for training: [B, T, D] -> [B, T, D]."""
        at = Pass(torch.arange(x_BTD.shape[1], device=x_BTD.device), 0, {"embedding": (x_BTD,)})
        y_BTD: Tensor = self.stack(x_BTD, None, at)[0]
        return y_BTD

    def head(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., X]."""
        logits = dense(self.final(x), self.read_weight())
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def final(self, x: Tensor) -> Tensor:
        """[..., D] of the stack to [..., D], of which logits are products with `read_weight`."""
        y: Tensor = self.norm(x)
        return y if self.output_scale == 1.0 else y * self.output_scale

    def read_weight(self) -> Tensor:
        """[X, D], of which logits are products with what `final` gives."""
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
        state). What is read first holds the prefix, if the model has one.

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
        x_BTD = self.embed(tokens_BT)
        positions_T = torch.arange(state.length, end, device=tokens_BT.device)
        at = Pass(positions_T, state.length, {"embedding": (x_BTD,)})
        x_BD, layers = self.stack.last(x_BTD, state.layers, at)
        return self.head(x_BD), State(end, state.capacity, state.position + length, layers)

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
        self.stack.between(state.layers, state.length)
        logits_BX, layers = self.advance(token_B, state.position, state.layers)
        return logits_BX, State(state.length + 1, state.capacity, state.position.add_(1), layers)

    def advance(
        self, token_B: Tensor, position: Tensor, layers: list[dict[str, Tensor]]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The device work of a step. Nothing in it depends on a value of the host: a graph can capture it."""
        x_BD = self.embed(token_B)
        x_BD, layers = self.stack.step(x_BD, layers, Pass(position, 0, {"embedding": (x_BD[:, None],)}))
        return self.head(x_BD), layers


def language_model(architecture: Architecture, backend: Backend) -> Part:
    """The model as a part. Raises ValueError where it is illegal or the backend cannot run it."""
    reason = architecture.why_illegal()
    if reason is not None:
        raise ValueError(reason)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    assembly = _Assembly(architecture, backend)
    more: dict[str, float] = {}
    if architecture.embed_scale != 1.0:
        given = architecture.embed_scale
        more["embed_scale"] = math.sqrt(architecture.width) if isinstance(given, str) else given
    if not isinstance(architecture.softcap, str):
        more["softcap"] = architecture.softcap
    if architecture.scale == "mup":
        more |= {"output_scale": output_scale(architecture.width), "row_scale": BASE**-0.5}
    if architecture.prefix:
        more["prefix"] = architecture.prefix
    part = Part(
        LanguageModel,
        vocab=architecture.vocab,
        width=architecture.width,
        tied=architecture.embed == "tied",
        stack=assembly.stack(),
        norm=assembly.norm(),
        **more,
    )
    return part if architecture.eps is None else _with_eps(part, architecture.eps)


_NORMS = (RMSNorm, SimpleRMSNorm, nn.LayerNorm, ProgressiveNorm)


def _with_eps(part: Part, eps: float) -> Part:
    """The same part with this number under the root of every norm."""
    given = {"eps": eps} if part.make in _NORMS else {}
    return Part(part.make, **{name: _within(value, eps) for name, value in part.arguments.items()}, **given)


def _within(value: object, eps: float) -> object:
    if isinstance(value, Part):
        return _with_eps(value, eps)
    return [_within(each, eps) for each in value] if isinstance(value, list) else value


# Where a residual unit's norms stand.
_PLACES = {
    "pre": ("before",),
    "post": ("after",),
    "sandwich": ("before", "inside"),
    "inside": ("inside",),
    "deep": ("after",),
    "gated": ("before",),
    "none": (),
}


class _Assembly:
    """The parts of one architecture's stack. It tells each mixer which of the layers of its kind it is."""

    def __init__(self, architecture: Architecture, backend: Backend) -> None:
        self.architecture = architecture
        self.backend = backend
        self.counts = Counter(mixer.kind for mixer in mixers(architecture.stack))
        self.seen = Counter[str]()

    def stack(self) -> Part:
        units = [self.unit(unit) for unit in self.architecture.stack]
        match self.architecture.shortcut:
            case "average":
                stack = Part(ShortcutStack, units=units, mix=Part(DepthAverage, units=len(units)))
            case "attention":
                width = self.architecture.width
                heads = default_heads(width)
                mix = Part(DepthAttention, width=width, heads=heads, units=len(units), norm=self.norm())
                stack = Part(ShortcutStack, units=units, mix=mix)
            case _:
                stack = Part(Stack, units=units)
        return Part(with_sigma, stack=stack) if self.architecture.weights == "sigma" else stack

    def unit(self, unit: StackUnit) -> Part:
        match unit:
            case Segment():
                return self.segment(unit)
            case Reuse():
                return self.reuse(unit)
            case ResidualUnit(body=(Layer() | BesideUnit() as only,)):
                return self.residual(only, unit.place)
            case ResidualUnit():
                return self.around(unit)
        return self.residual(unit, None)

    def residual(self, unit: Layer | BesideUnit, place: str | None) -> Part:
        """A residual unit around its function."""
        place = place or self.architecture.place
        return Part(
            Residual,
            mixer=self.branches(unit),
            **self.norms(place, unit),
            **self.norms(place),
            **self.stream(place),
        )

    def around(self, unit: ResidualUnit) -> Part:
        """A residual connection around units that are applied one after the other."""
        place = unit.place or self.architecture.place
        body = [
            Part(Branch, mixer=self.branches(each), **self.norms(place, each))
            if isinstance(each, Layer | BesideUnit)
            else self.unit(each)
            for each in unit.body
        ]
        stack = Part(Stack, units=body)
        return Part(ResidualStack, body=stack, **self.norms(place), **self.stream(place))

    def segment(self, unit: Segment) -> Part:
        """Layers that begin anew in each segment."""
        sizes = {"width": self.architecture.width, "length": unit.length, "memory": unit.memory}
        if not isinstance(unit.carry, Form):
            return Part(SegmentStack, **sizes, body=self.body(unit.body))
        key_dim = int(unit.carry.arguments[0])
        blocks = [
            Part(
                AssociativeBlock,
                width=self.architecture.width,
                key_dim=key_dim,
                body=self.body(block),
            )
            for block in unit.blocks()
        ]
        return Part(AssociativeSegments, **sizes, blocks=blocks)

    def body(self, units: tuple[StackUnit, ...]) -> Part:
        """Units one after the other."""
        return Part(Stack, units=[self.unit(each) for each in units])

    def reuse(self, unit: Reuse) -> Part:
        """Weights applied several times."""
        body = self.body(unit.body)
        if unit.is_plain:
            return Part(Stack, **body.arguments, times=unit.times)
        width = self.architecture.width
        more: dict[str, Part] = {}
        if unit.signal != "none":
            more["signal"] = Part(TimeSignal, width=width, times=unit.times)
        if unit.halt != "none":
            more["halting"] = Part(Halting, width=width)
        return Part(Recurrence, body=body, times=unit.times, **more)

    def norms(self, place: str, unit: Layer | BesideUnit | None = None) -> dict[str, Part]:
        """The norms around a mixer of a residual, or that of its sum, and what stands where there is none."""
        there = _PLACES[place]
        if unit is not None and norms_input(unit):
            there = tuple(each for each in there if each != "before")
        where = ("after",) if unit is None else ("before", "inside")
        return {each: self.norm() if each in there else Part(nn.Identity) for each in where}

    def stream(self, place: str) -> dict[str, Part | float]:
        """What a place does to the residual stream beside its norms."""
        match place:
            case "deep":
                return {"stream": self.architecture.depth**0.25}
            case "gated":
                return {"gate": Part(StreamGate, width=self.architecture.width)}
        return {}

    def norm(self) -> Part:
        """The norm of the residual stream."""
        width = self.architecture.width
        match self.architecture.norm:
            case Form(arguments=(steps,)):
                layer = Part(nn.LayerNorm, normalized_shape=width)
                return Part(ProgressiveNorm, width=width, steps=int(steps), layer=layer)
            case "layer":
                return Part(nn.LayerNorm, normalized_shape=width)
            case "simple":
                return Part(SimpleRMSNorm)
        return norm_part(width, self.backend)

    def branches(self, unit: Layer | BesideUnit) -> Part:
        """The function of a residual unit: one mixer, or several beside one another."""
        if isinstance(unit, Layer):
            return self.mixer(unit.mixer)
        width = self.architecture.width
        branches = [self.mixer(mixer) for mixer in unit.branches]
        norms = [norm_part(width, self.backend) if unit.is_normed else Part(nn.Identity) for _ in branches]
        readers = list(unit.readers(width))
        more = {"readers": readers} if readers else {}
        match unit.fuse:
            case "mean":
                return Part(Beside, branches=branches, fuse=Part(MeanFuse, norms=norms), **more)
            case "sum":
                fuse = Part(SumFuse)
            case "scalar":
                fuse = Part(ScalarFuse, branches=len(branches))
            case "gate":
                fuse = Part(GateFuse, width=width, branches=len(branches))
            case "concat":
                fuse = Part(ConcatFuse, width=width, branches=len(branches))
            case "read":
                fuse = Part(ReadFuse, readers=readers)
        if unit.is_normed:
            fuse = Part(NormedFuse, norms=norms, fuse=fuse)
        return Part(Beside, branches=branches, fuse=fuse, **more)

    def mixer(self, mixer: Mixer) -> Part:
        placed = mixer.placed(self.seen[mixer.kind], self.counts[mixer.kind])
        self.seen[mixer.kind] += 1
        part = placed.build(self.architecture.width, self.backend)
        return Part(Pointwise, inner=part) if mixer.is_pointwise else part


# What ends a residual branch.
_LAST = (".out.weight", ".out.gamma", ".inside.weight", ".inside.eta", ".inside.layer.weight")


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
    it. On the device `meta` it has shapes alone: nothing is drawn, and no memory is taken. Raises ValueError where the
    architecture is illegal, the backend cannot run it, or the device is not here.
    """
    where = _device(device)
    part = language_model(architecture, backend)
    factors = _rate_factors(architecture) if architecture.scale == "mup" else {}
    # Weights are drawn where every device draws the same.
    place = on_meta() if where.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), place:
        torch.manual_seed(seed)
        model: LanguageModel = part.build()
        shrink = 1 / math.sqrt(architecture.depth)
        if architecture.place == "deep":
            # The square of the gain (8 N)^(-1/4), where the units are two for each of N layers.
            shrink /= 2
        for name, weight in model.stack.named_parameters():
            # A norm at the end of a branch would undo what is done to the weights before it.
            if name.endswith(_LAST) or ".fuse.norms." in name:
                weight.mul_(shrink)
    model.rate_factors = factors
    return model.to(device=where, dtype=dtype).eval()


def _device(device: str | torch.device) -> torch.device:
    """Raises ValueError for one that torch does not know or see."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {device!r} is none that torch knows; give cpu, cuda, cuda:1 or the like"
        ) from error
    count = torch.cuda.device_count() if where.type == "cuda" else 0
    if where.type == "cuda" and (where.index or 0) >= count:
        raise ValueError(
            f"device {str(where)!r} is not here: torch {torch.__version__} sees GPUs: {count}; build with device='cpu'"
        )
    return where


def _rate_factors(architecture: Architecture) -> dict[str, float]:
    """By the shapes of the model and of one twice as wide. Raises ValueError where there is no such one."""
    width = 2 * architecture.width
    try:
        doubled = architecture.replace(width=width)
        reason = doubled.why_illegal()
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"scale=mup compares the model with one of width {width}, which is illegal: {reason}; "
            f"leave it at scale=standard"
        )
    with on_meta():
        narrow, wide = (language_model(each, "torch").build() for each in (architecture, doubled))
    factors = rate_factors(narrow.stack, wide.stack, architecture.width)
    return {f"stack.{name}": factor for name, factor in factors.items()}
