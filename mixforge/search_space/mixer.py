"""What every mixer of the catalogue says of itself: its genes, when it is illegal, what it costs, how it is built.

A mixer's file holds one final subclass of `Mixer`, a frozen dataclass whose fields are its genes (see `genes`).
This module loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple, Self

from mixforge.search_space.genes import (
    Gene,
    GeneValue,
    all_values,
    changed_genes,
    gene_json,
    genes_of,
)
from mixforge.search_space.part import Part

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "torch", "triton")


class Cost(NamedTuple):
    """Exact costs of a module for one sequence of `length` tokens (batch 1).

    params: weights, counted once however often they are applied.
    flops: matmul FLOPs of one forward pass over the sequence in the `torch` form, two for each multiply-add.
    state_bytes: bytes that decoding keeps after `length` tokens (caches and recurrent states).
    decode_bytes: bytes moved to decode one more token: weights read, state read, state written.
    idle_params: of `params`, those that one token does not pass, as the experts that it is not sent to.
    """

    params: int
    flops: int
    state_bytes: int
    decode_bytes: int
    idle_params: int = 0

    @property
    def active_params(self) -> int:
        """The weights that one token passes. Experts that several layers share count as those of one layer."""
        return self.params - self.idle_params

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(
            params=self.params + other.params,
            flops=self.flops + other.flops,
            state_bytes=self.state_bytes + other.state_bytes,
            decode_bytes=self.decode_bytes + other.decode_bytes,
            idle_params=self.idle_params + other.idle_params,
        )


@dataclass(frozen=True, slots=True)
class Loan:
    """Tensors that one mixer lends to those after it, by their sizes.

    extent: `cache` is one entry for each token so far: [batch, shape[0], tokens, *shape[1:]]; `pass` one for each
    token of the present pass: [batch, tokens, *shape]; `weights` are parameters of exactly that shape.
    read: of `weights` whose first axis is experts, how many of them the borrower reads for one token; None is all.
        It is the borrower's own and no part of whether a loan fits.
    turn: how what is lent is turned by its position, which a reader must be too; empty where it is not.
    """

    extent: Literal["cache", "pass", "weights"]
    shapes: tuple[tuple[int, ...], ...]
    read: int | None = field(default=None, compare=False)
    turn: str = ""

    def __str__(self) -> str:
        return " and ".join(dict.fromkeys(" x ".join(map(str, shape)) for shape in self.shapes))


@dataclass(frozen=True, slots=True)
class Mixer(ABC):
    """A residual unit's function: `token` mixers mix along time, `channel` mixers along width."""

    kind: ClassVar[Literal["token", "channel"]]
    _word: ClassVar[str]
    # Famous points of the gene space by their short names: {"gdn": {"rule": "delta", "decay": "scalar"}}.
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {}
    # Mixers are keys of every memory, and some have forty genes: each finds these once, when first asked.
    _json: str = field(init=False, repr=False, compare=False)
    _fault: str | None = field(init=False, repr=False, compare=False)

    def __init_subclass__(cls) -> None:
        # Otherwise a dataclass makes one of its own.
        cls.__hash__ = Mixer.__hash__  # type: ignore[method-assign]
        cls._word = cls.__module__.rpartition(".")[2]

    def __hash__(self) -> int:
        # A text keeps its hash.
        try:
            return hash(self._json)
        except AttributeError:
            return hash(self.json)

    @property
    def fault(self) -> str | None:
        """A sentence on the first gene whose value is none of its legal ones; None where all are."""
        try:
            return self._fault
        except AttributeError:
            # A default is legal.
            wrong = ((gene, value) for gene, value in changed_genes(self) if not gene.has(value))
            said = (f"{gene.name}={value} is not legal; expected {gene}" for gene, value in wrong)
            object.__setattr__(self, "_fault", next(said, None))
            return self._fault

    @property
    def json(self) -> str:
        """Canonical JSON: its name and the genes that differ from their defaults, in the order of their names."""
        try:
            return self._json
        except AttributeError:
            object.__setattr__(self, "_json", self._write_json(changed_genes(self)))
            return self._json

    @classmethod
    def _write_json(cls, changed: list[tuple[Gene, GeneValue]]) -> str:
        parts = [gene_json(gene, value) for gene, value in changed]
        parts.sort()
        return f'["{cls.word()}",{{{",".join(parts)}}}]'

    @classmethod
    def of(cls, genes: Mapping[str, GeneValue]) -> Self:
        """The mixer with these genes, each of which holds one of its legal values: they are not looked at again."""
        made, known = cls(**genes), genes_of(cls)
        changed = [(gene, value) for name, value in genes.items() if value != (gene := known[name]).default]
        object.__setattr__(made, "_json", cls._write_json(changed))
        object.__setattr__(made, "_fault", None)
        return made

    def __reduce__(self) -> tuple[Callable[..., Mixer], tuple[object, ...]]:
        # A hash does not outlive its process.
        return type(self)._from_values, all_values(self)

    @classmethod
    def _from_values(cls, *values: GeneValue) -> Self:
        return cls(**dict(zip(genes_of(cls), values, strict=True)))

    @classmethod
    def word(cls) -> str:
        """The mixer's name in an expression: the name of its file."""
        return cls._word

    @property
    def is_pointwise(self) -> bool:
        """Whether its module sees one token at a time and keeps no state, as a channel mixer does."""
        return self.kind == "channel"

    @property
    def carries(self) -> bool:
        """Whether a pass of training begins with what the pass before it left, so that it is applied once in a pass."""
        return False

    @property
    def prefix(self) -> int:
        """Tokens at the beginning of a sequence that are read together, so that each may have a say in all of them.

        What is said of token t, from 0, follows from tokens 0 to max(t, prefix - 1). They are those of the first pass
        over a sequence, at most so many. 0 where no token sees a later one.
        """
        return 0

    @property
    def norms_input(self) -> bool:
        """Whether it norms what it reads itself, so that no norm of its residual unit stands before it."""
        return False

    def placed(self, index: int, count: int) -> Self:
        """This mixer as the `index`-th, from 0, of `count` layers of its `kind`, where its equations ask for that.

        The model builder calls it before `build`; what it sets changes no cost and is no part of the text.
        """
        return self

    def lends(self, width: int) -> Mapping[str, Loan]:
        """What layers after this one may read, by name (see `loans`)."""
        return {}

    def borrows(self, width: int) -> Mapping[str, Loan]:
        """What it reads from a layer before it, by name."""
        return {}

    def unread(self, names: frozenset[str]) -> Self:
        """The same mixer where no layer reads these things that it lends."""
        return self

    @abstractmethod
    def why_illegal(self, width: int) -> str | None:
        """None where the genes make a module of this width, else a sentence with the numbers in it."""

    @abstractmethod
    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        """Exact costs; `itemsize` is bytes per weight and per cached value (recurrent states stay float32)."""

    @abstractmethod
    def build(self, width: int, backend: Backend) -> Part:
        """The module, as a part. Raises ValueError where the backend cannot run it."""

    def canonical(self, width: int) -> Self:
        """The same mixer with genes that say what already follows from the width put back to their default."""
        return self

    def narrow(self, width: int, share: Fraction) -> Self:
        """This mixer with only `share` of its heads (or channels), as one branch of an intra-layer hybrid.

        Raises ValueError, with the numbers, where the heads do not divide so.
        """
        raise ValueError(f"{type(self).__name__.lower()} has no heads to share; give it no factor inside '|'")
