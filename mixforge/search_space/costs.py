"""What a stack costs: the sum of what its mixers say, what is around them in a residual unit, and what fuses them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

from mixforge.search_space.genes import Form
from mixforge.search_space.mixer import Cost, Mixer
from mixforge.search_space.stack import Beside, Layer, Residual, Reuse, Segment, Unit, norms_input


@lru_cache(maxsize=65_536)
def mixer_cost(mixer: Mixer, width: int, length: int, itemsize: int) -> Cost:
    """`Mixer.cost`, remembered."""
    return mixer.cost(width, length, itemsize)


class Frame(NamedTuple):
    """What an architecture's words put around every mixer."""

    norm: str | Form
    place: str
    weights: str

    @property
    def has_sigma(self) -> bool:
        return self.weights == "sigma"


@lru_cache(maxsize=65_536)
def unit_cost(unit: Unit, width: int, length: int, itemsize: int, frame: Frame) -> Cost:
    """Costs of a unit with its norms and gates; without those where it is one mixer or several beside one another."""
    match unit:
        case Layer() | Beside():
            found = _function_cost(unit, width, length, itemsize)
            return found + sigma_cost(matrices(unit, width), itemsize) if frame.has_sigma else found
        case Residual():
            return around_cost(unit, width, length, itemsize, frame)
        case Reuse():
            parts = [body_cost(unit.body, width, length, itemsize, frame)]
            if unit.halt != "none":
                parts.append(weights_cost(width, 1, length, itemsize))
                parts.append(sigma_cost(1 if frame.has_sigma else 0, itemsize))
            return sum_costs(parts, unit.times)
        case Segment():
            inside = in_segments(unit, length, partial(_of_length, unit.body, width, itemsize, frame))
            return inside + memory_cost(unit, width, length, itemsize, frame)


def _function_cost(unit: Layer | Beside, width: int, length: int, itemsize: int) -> Cost:
    """Of a residual unit's function alone."""
    if isinstance(unit, Layer):
        # The unit itself is remembered.
        return unit.mixer.cost(width, length, itemsize)
    parts = [mixer_cost(mixer, width, length, itemsize) for mixer in unit.branches]
    return sum_costs([*parts, fuse_cost(unit, width, length, itemsize)])


def around_cost(unit: Residual, width: int, length: int, itemsize: int, frame: Frame) -> Cost:
    """Of a residual connection around several mixers, and of residuals inside it."""
    own = frame if unit.place is None else frame._replace(place=unit.place)
    mixers = [each for each in unit.body if isinstance(each, Layer | Beside)]
    parts = [unit_cost(each, width, length, itemsize, frame) for each in unit.body]
    read = sum(1 for each in mixers if not norms_input(each))
    return sum_costs([*parts, residual_cost(own, width, length, itemsize, len(mixers), read)])


def body_cost(units: tuple[Unit, ...], width: int, length: int, itemsize: int, frame: Frame) -> Cost:
    """Of units one after the other, each mixer in a residual of its own."""
    parts = [unit_cost(unit, width, length, itemsize, frame) for unit in units]
    reads = [not norms_input(unit) for unit in units if isinstance(unit, (Layer, Beside))]
    for read in (True, False):
        around = residual_cost(frame, width, length, itemsize, 1, int(read))
        parts.append(repeated(around, reads.count(read)))
    return sum_costs(parts)


def repeated(cost: Cost, count: int) -> Cost:
    """Costs of so many modules that cost the same."""
    return Cost(*[count * figure for figure in cost])


def _of_length(units: tuple[Unit, ...], width: int, itemsize: int, frame: Frame, length: int) -> Cost:
    return body_cost(units, width, length, itemsize, frame)


def in_segments(unit: Segment, length: int, cost: Callable[[int], Cost]) -> Cost:
    """Costs of what stands in a segment, from its costs at a length.

    Decoding is that of a token inside a segment: what lies between two segments is not counted, and a segment that
    has not begun counts as one of a single token.
    """
    earlier = unit.earlier(length)
    whole, last = cost(unit.slots), cost(unit.ahead + length - earlier * unit.length)
    return Cost(
        params=whole.params,
        flops=earlier * whole.flops + last.flops,
        state_bytes=whole.state_bytes,
        decode_bytes=cost(max(1, unit.ahead + length % unit.length)).decode_bytes,
        idle_params=whole.idle_params,
    )


def memory_cost(unit: Segment, width: int, length: int, itemsize: int, frame: Frame) -> Cost:
    """Of the memory tokens, and of the matrices that they write to."""
    tokens = unit.memory * width
    if not isinstance(unit.carry, Form):
        return Cost(params=tokens, flops=0, state_bytes=tokens * itemsize, decode_bytes=0)
    key_dim = int(unit.carry.arguments[0])
    # Of each block: a matrix and a vector in float32; every token asks it, memory tokens write to it.
    features = 6 * key_dim
    state = 4 * features * (width + 1)
    earlier = unit.earlier(length)
    reads = (length + earlier * unit.memory) * (width * key_dim + features * width)
    writes = earlier * unit.memory * (width * (key_dim + width + 1) + 2 * features * width)
    block = Cost(
        params=width * (2 * key_dim + width + 1) + 1 + (4 if frame.has_sigma else 0),
        flops=2 * (reads + writes),
        state_bytes=state,
        decode_bytes=state + (width * key_dim + (2 if frame.has_sigma else 0)) * itemsize,
    )
    learned = Cost(params=tokens, flops=0, state_bytes=0, decode_bytes=0)
    return sum_costs([learned, *[block] * len(unit.blocks())])


def fuse_cost(unit: Beside, width: int, length: int, itemsize: int) -> Cost:
    """A gate has a score for each branch, a concatenation one matrix, scalars one number for each branch."""
    branches = len(unit.branches)
    matrix = {"gate": branches * width, "concat": branches * width * width}.get(unit.fuse, 0)
    norms = branches * width if unit.is_normed else 0
    scalars = branches if unit.fuse == "scalar" else 0
    return weights_cost(matrix, norms + scalars, length, itemsize)


@lru_cache(maxsize=4_096)
def matrices(unit: Layer | Beside, width: int) -> int:
    """Matrices of a residual unit's function, which are known once its modules are made, without values."""
    # The mixers are made of torch modules; reading and comparing architectures needs none of them.
    import torch

    from mixforge.search_space.on_meta import on_meta
    from mixforge.search_space.parts.stacked import Stacked

    branches = (unit.mixer,) if isinstance(unit, Layer) else unit.branches
    with on_meta():
        modules = [mixer.build(width, "torch").build() for mixer in branches]
    parts = [each for module in modules for each in module.modules()]
    found = sum(isinstance(each, torch.nn.Linear) for each in parts)
    found += sum(len(each.weight) for each in parts if isinstance(each, Stacked))
    return found + (1 if isinstance(unit, Beside) and unit.fuse in ("gate", "concat") else 0)


def sigma_cost(count: int, itemsize: int) -> Cost:
    """Of matrices divided by their spectral norm: a number each, and the norm, which is kept for decoding.

    All of stacked matrices count, as all are divided before some are taken.
    """
    return Cost(params=count, flops=0, state_bytes=0, decode_bytes=2 * count * itemsize)


@lru_cache(maxsize=4_096)
def residual_cost(frame: Frame, width: int, length: int, itemsize: int, mixers: int, read: int) -> Cost:
    """Of what stands around so many mixers in one residual: norms and, where it is gated, six matrices in three.

    read: those that read what a norm of the residual gives.
    """
    counts = {"sandwich": read + mixers, "inside": mixers, "none": 0, "post": 1, "deep": 1}
    norms = repeated(norm_cost(frame.norm, width, itemsize), counts.get(frame.place, read))
    if frame.place != "gated":
        return norms
    gates = weights_cost(6 * width * width, width, length, itemsize)
    return norms + gates + sigma_cost(3 if frame.has_sigma else 0, itemsize)


def shortcut_cost(shortcut: str, units: int, width: int, length: int, itemsize: int, frame: Frame) -> Cost:
    """Of what a stack of so many units has beside them: numbers for each depth, or attention to all of them."""
    match shortcut:
        case "average":
            return weights_cost(0, units * (units + 3) // 2, length, itemsize)
        case "attention":
            weights = weights_cost(4 * width * width, 0, length, itemsize)
            # Keys and values of the depths below, and the products with them.
            more = 4 * length * units * width * width + 4 * length * (units + 1) * width
            products = Cost(params=0, flops=more, state_bytes=0, decode_bytes=0)
            norm = norm_cost(frame.norm, width, itemsize)
            return weights + products + norm + sigma_cost(3 if frame.has_sigma else 0, itemsize)
    return Cost(params=0, flops=0, state_bytes=0, decode_bytes=0)


def norm_cost(norm: str | Form, width: int, itemsize: int) -> Cost:
    """Of one norm."""
    if isinstance(norm, Form):
        # Weights and biases of two norms, and eta; decoding reads their statistics and the number of passes too.
        params = 4 * width + 1
        return Cost(params=params, flops=0, state_bytes=0, decode_bytes=(params + 2 * width) * itemsize + 8)
    return weights_cost(0, {"rms": width, "layer": 2 * width, "simple": 0}[norm], 1, itemsize)


def weights_cost(matrices: int, vectors: int, length: int, itemsize: int) -> Cost:
    """Of weights alone: those of matrices are multiplied once for each token, those of vectors are no products."""
    return Cost(
        params=matrices + vectors,
        flops=2 * length * matrices,
        state_bytes=0,
        decode_bytes=(matrices + vectors) * itemsize,
    )


def sum_costs(costs: list[Cost], times: int = 1) -> Cost:
    """Costs of modules applied `times` times: their weights are counted once and read every time."""
    params, flops, state_bytes, decode_bytes, idle_params = map(sum, zip(*costs, strict=True))
    return Cost(
        params=params,
        flops=times * flops,
        state_bytes=times * state_bytes,
        decode_bytes=times * decode_bytes,
        idle_params=idle_params,
    )
