"""An architecture: a stack of residual units and the model around it, as a frozen value with one form.

Two architectures that are the same model are equal and have one canonical JSON text, one digest and one
expression. This module loads no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from mixforge.search_space.canonical import canonical
from mixforge.search_space.costs import (
    Frame,
    body_cost,
    in_segments,
    mixer_cost,
    norm_cost,
    shortcut_cost,
    sum_costs,
)
from mixforge.search_space.genes import Form, GeneValue, gene_json
from mixforge.search_space.legality import Illegality as Illegality
from mixforge.search_space.legality import illegality
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.spelling import spell_architecture, spell_gene, spell_mixer
from mixforge.search_space.stack import MOST_UNITS, depth, mixers, unit_json
from mixforge.search_space.stack import Beside as Beside
from mixforge.search_space.stack import Fuse as Fuse
from mixforge.search_space.stack import Layer as Layer
from mixforge.search_space.stack import Residual as Residual
from mixforge.search_space.stack import Reuse as Reuse
from mixforge.search_space.stack import Segment as Segment
from mixforge.search_space.stack import Unit as Unit
from mixforge.search_space.syntax import nearest
from mixforge.search_space.words import WIDTH, WORDS, names_of

if TYPE_CHECKING:
    import torch

    from mixforge.search_space.model import LanguageModel

# The names that may stand as the values of the words of `lm(...)`.
CHOICES: dict[str, tuple[str, ...]] = {word: names_of(gene) for word, gene in WORDS.items()}


RMS_EPS = 1e-6
_WORDS = {"width": WIDTH, **WORDS}


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """`lm(stack, width=...)`. The stack is put into canonical form on construction.

    stack: the residual units in order, repeats written out. width: of the residual stream. See `words` for the
    others.
    """

    stack: tuple[Unit, ...]
    width: int
    vocab: int = 256
    embed: str = "tied"
    norm: str | Form = "rms"
    place: str = "pre"
    eps: float | None = None
    scale: str = "standard"
    weights: str = "plain"
    shortcut: str = "none"
    softcap: float | str = "none"
    embed_scale: float | str = 1.0
    _json: str = field(init=False, repr=False)
    _digest: str | None = field(init=False, repr=False, default=None)
    _text: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        for word, gene in _WORDS.items():
            given = getattr(self, word)
            # A default is legal, but the width has none.
            if (gene is WIDTH or given is not gene.default) and not gene.has(given):
                hint = nearest(given, names_of(gene)) if isinstance(given, str) else ""
                raise ValueError(f"{word} {given!r} is not legal; expected {gene}{hint}")
        if not self.stack:
            raise ValueError("the stack is empty; it needs at least one layer")
        if len(self.stack) > MOST_UNITS or depth(self.stack) > MOST_UNITS:
            raise ValueError(
                f"the stack is {depth(self.stack)} layers deep; at most {MOST_UNITS} are allowed"
            )
        object.__setattr__(self, "stack", canonical(self.stack, self.width, self.place))
        for word, value in self._settled_words():
            object.__setattr__(self, word, value)
        object.__setattr__(self, "_json", self._write_json())

    def _settled_words(self) -> Iterator[tuple[str, GeneValue]]:
        """Words that say what holds without them."""
        # Layer and batch norms have an epsilon of their own, which is not that of the norms inside the mixers.
        if self.norm in ("rms", "simple") and self.eps == RMS_EPS:
            yield "eps", None
        root = math.sqrt(self.width)
        if self.embed_scale in ("sqrt", root):
            yield "embed_scale", "sqrt" if root != 1 else 1.0

    def _said(self) -> list[tuple[str, GeneValue]]:
        """The words that are not at their default, in their order."""
        return [
            (word, value) for word, gene in WORDS.items() if (value := getattr(self, word)) != gene.default
        ]

    def _write_json(self) -> str:
        units = [unit.mixer.json if isinstance(unit, Layer) else unit_json(unit) for unit in self.stack]
        parts = [f'"units":[{",".join(units)}]', f'"width":{self.width}']
        parts += [gene_json(WORDS[word], value) for word, value in self._said()]
        return "{" + ",".join(sorted(parts)) + "}"

    @property
    def canonical_json(self) -> str:
        """The architecture as JSON: a flat list of units, defaults dropped, keys sorted."""
        return self._json

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON, in hexadecimal: the architecture's identity everywhere."""
        if self._digest is None:
            object.__setattr__(self, "_digest", hashlib.sha256(self._json.encode()).hexdigest())
        assert self._digest is not None
        return self._digest

    def __eq__(self, other: object) -> bool:
        return self._json == other._json if isinstance(other, Architecture) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._json)

    def __str__(self) -> str:
        """The canonical expression: repeats factored, shortest names, defaults dropped."""
        if self._text is None:
            said = [("width", str(self.width)), *((word, spell_gene(value)) for word, value in self._said())]
            object.__setattr__(self, "_text", spell_architecture(self.stack, self.width, tuple(said)))
        assert self._text is not None
        return self._text

    def replace(
        self,
        *,
        width: int | None = None,
        vocab: int | None = None,
        embed: str | None = None,
        norm: str | Form | None = None,
        place: str | None = None,
        eps: float | None = None,
        scale: str | None = None,
        weights: str | None = None,
        shortcut: str | None = None,
        softcap: float | str | None = None,
        embed_scale: float | str | None = None,
    ) -> Architecture:
        """The same stack in another model."""
        given: dict[str, GeneValue] = {
            "width": width,
            "vocab": vocab,
            "embed": embed,
            "norm": norm,
            "place": place,
            "eps": eps,
            "scale": scale,
            "weights": weights,
            "shortcut": shortcut,
            "softcap": softcap,
            "embed_scale": embed_scale,
        }
        changed = {word: value for word, value in given.items() if value is not None}
        return replace(self, **changed)  # type: ignore[arg-type]

    @property
    def depth(self) -> int:
        """Residual units that a token passes through, reused ones as often as they are applied."""
        return depth(self.stack)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The names of its mixers, each once, in the order of the stack."""
        names = (spell_mixer(mixer, self.width).partition("(")[0] for mixer in mixers(self.stack))
        return tuple(dict.fromkeys(names))

    @property
    def prefix(self) -> int:
        """Tokens that a sequence's first pass reads together, at most: the most of its mixers (see `Mixer.prefix`)."""
        return max(mixer.prefix for mixer in mixers(self.stack))

    def why_illegal(self) -> str | None:
        """None where it can be built, else a sentence with the numbers in it."""
        found = self.illegality()
        return None if found is None else found.sentence

    def illegality(self) -> Illegality | None:
        """Which rule it breaks first, and the sentence of `why_illegal`; None where it can be built."""
        return illegality(self.stack, self.width, self.norm)

    def cost(self, length: int, itemsize: int = 4) -> Cost:
        """Exact costs of the built model for one sequence of `length` tokens; see `Cost`."""
        if length < 1:
            raise ValueError(f"length {length} is not a number of tokens from 1 up")
        frame = Frame(self.norm, self.place, self.weights)
        stack = body_cost(self.stack, self.width, length, itemsize, frame)
        shortcut = shortcut_cost(self.shortcut, len(self.stack), self.width, length, itemsize, frame)
        return sum_costs([self._frame_cost(length, itemsize), stack, shortcut])

    def _frame_cost(self, length: int, itemsize: int) -> Cost:
        """Embedding, last norm and head."""
        table = self.vocab * self.width
        tables = Cost(
            params=table * (1 if self.embed == "tied" else 2),
            flops=2 * length * table,
            state_bytes=0,
            # One row of the embedding, and the whole of the head.
            decode_bytes=itemsize * (self.width + table),
        )
        return tables + norm_cost(self.norm, self.width, itemsize)

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The stack as a flat list, one entry for each mixer, for tables and pictures."""
        return tuple(self._entries(self.stack, 1, None, Counter()))

    def _entries(
        self, units: tuple[Unit, ...], times: int, segment: Segment | None, counter: Counter
    ) -> Iterator[LayerEntry]:
        for unit in units:
            if isinstance(unit, Reuse):
                yield from self._entries(unit.body, times * unit.times, segment, counter)
                continue
            if isinstance(unit, Segment):
                yield from self._entries(unit.body, times, unit, counter)
                continue
            if isinstance(unit, Residual):
                yield from self._entries(unit.body, times, segment, counter)
                continue
            counter.number += 1
            branches = (unit.mixer,) if isinstance(unit, Layer) else unit.branches
            for mixer in branches:
                yield LayerEntry(
                    number=counter.number,
                    text=spell_mixer(mixer, self.width),
                    mixer=mixer,
                    width=self.width,
                    times=times,
                    beside=len(branches),
                    segment=segment,
                )

    def build(
        self,
        backend: Backend = "torch",
        seed: int = 0,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> LanguageModel:
        """The model, its weights drawn from `seed`; float32 unless `dtype` says otherwise.

        Raises ValueError where the architecture is illegal or the backend cannot run it.
        """
        # The model needs torch, which reading, comparing and storing architectures must not load.
        from mixforge.search_space.model import build

        return build(
            self, backend=backend, seed=seed, device=device, **({} if dtype is None else {"dtype": dtype})
        )


@dataclass(slots=True)
class Counter:
    """How many residual units have been listed."""

    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntry:
    """One mixer of the stack, as a row of a table."""

    number: int
    """Of its residual unit, from 1. Mixers beside one another have one number."""
    text: str
    """The mixer as an expression."""
    mixer: Mixer
    width: int
    times: int
    """How often its weights are applied."""
    beside: int
    """How many mixers share its residual unit; 1 where it is alone."""
    segment: Segment | None = None
    """The segment that it stands in."""

    @property
    def name(self) -> str:
        """Its shortest name."""
        return self.text.partition("(")[0]

    @property
    def genes(self) -> str:
        """What stands between the brackets: the genes that the name does not say."""
        return self.text.partition("(")[2].removesuffix(")")

    @property
    def kind(self) -> Literal["token", "channel"]:
        return self.mixer.kind

    def cost(self, length: int, itemsize: int = 4) -> Cost:
        """Of this mixer alone, without its norm, in all its applications."""
        if self.segment is None:
            return sum_costs([mixer_cost(self.mixer, self.width, length, itemsize)], self.times)
        inside = partial(_cost_of_length, self.mixer, self.width, itemsize)
        return sum_costs([in_segments(self.segment, length, inside)], self.times)


def _cost_of_length(mixer: Mixer, width: int, itemsize: int, length: int) -> Cost:
    return mixer_cost(mixer, width, length, itemsize)
