"""An architecture being written down beside its weights, one residual unit after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse


class Tensors:
    """A checkpoint's tensors by name, each to be taken once; what is left over at the end was not understood."""

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        self.left = dict(found)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Raises ValueError where the checkpoint has no such tensor."""
        if name not in self.left:
            raise ValueError(f"the checkpoint has no tensor {name}, which its class and config.json ask for")
        return self.left.pop(name)

    def put(self, name: str, value: Tensor) -> None:
        """A part of a tensor that was taken, to be taken under a name that is read elsewhere."""
        self.left[name] = value

    def rename(self, prefix: str, wanted: str) -> None:
        """Tensors whose names start so, under the names that are read elsewhere."""
        for name in [name for name in self.left if name.startswith(prefix)]:
            self.left[wanted + name.removeprefix(prefix)] = self.left.pop(name)

    def drop(self, ending: str) -> None:
        """Leave out buffers that follow from the configuration."""
        for name in [name for name in self.left if name.endswith(ending)]:
            del self.left[name]

    def drop_all(self, beginning: str) -> None:
        """Leave out what is there a second time."""
        for name in [name for name in self.left if name.startswith(beginning)]:
            del self.left[name]

    def norm(self, name: str, *, from_one: bool = False) -> Tensor:
        """A norm's weight; `from_one` where the checkpoint keeps what is added to 1."""
        weight = self.take(f"{name}.weight")
        return 1 + weight if from_one else weight


class Draft:
    """The units' expressions and the weights of the model that they make, under its names for them."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.words: dict[str, str] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, text: str, weights: Mapping[str, Tensor], **norms: Tensor | None) -> None:
        """One residual unit: its mixer's expression, the mixer's weights, and its norms by place (`before=`)."""
        of_mixer = {f"mixer.{name}": value for name, value in weights.items()}
        of_norms = {f"{place}.weight": norm for place, norm in norms.items() if norm is not None}
        self.add_unit(text, {**of_mixer, **of_norms})

    def add_unit(self, text: str, weights: Mapping[str, Tensor]) -> None:
        """One residual unit of any form: its expression, and its weights as the unit names them."""
        unit = f"stack.units.{len(self.units)}"
        self.units.append(text)
        self.weights |= {f"{unit}.{name}": value for name, value in weights.items()}

    def ends(self, embedding: Tensor, norm: Tensor, readout: Tensor | None) -> None:
        """The embedding [X, D], the last norm and the head [X, D], which is None where it is the embedding."""
        self.weights |= {"embedding.weight": embedding, "norm.weight": norm}
        self.words |= {"width": str(embedding.shape[1]), "vocab": str(embedding.shape[0])}
        if readout is not None:
            self.words["embed"] = "untied"
            self.weights["readout.weight"] = readout

    def architecture(self) -> Architecture:
        """Raises ValueError where the text means no legal architecture."""
        words = ", ".join(f"{word}={value}" for word, value in self.words.items())
        made = parse(f"lm({' + '.join(self.units)}, {words})")
        reason = made.why_illegal()
        if reason is not None:
            raise ValueError(f"the checkpoint says {made}, which cannot be built: {reason}")
        return made


def pointwise(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A channel mixer's weights as the model names them."""
    return {f"inner.{name}": value for name, value in weights.items()}


def branch(index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one of several mixers beside one another."""
    return {f"branches.{index}.{name}": value for name, value in weights.items()}


def rows(weight: Tensor, *sizes: int) -> Iterator[Tensor]:
    """A stacked projection [sum of sizes, D] in its parts."""
    return iter(torch.split(weight, list(sizes)))


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * K, ...] whose rotary pairs are neighbours, reordered so that pair i is (i, i + K/2)."""
    split = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape).contiguous()
