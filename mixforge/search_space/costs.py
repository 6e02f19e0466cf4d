"""What a stack costs: the sum of what its mixers say, their norms and what fuses them."""

from __future__ import annotations

from functools import lru_cache

from mixforge.search_space.mixer import Cost, Mixer
from mixforge.search_space.stack import Beside, Fuse, Layer, Reuse, Unit


@lru_cache(maxsize=65_536)
def mixer_cost(mixer: Mixer, width: int, length: int, itemsize: int) -> Cost:
    """`Mixer.cost`, remembered."""
    return mixer.cost(width, length, itemsize)


@lru_cache(maxsize=65_536)
def unit_cost(unit: Unit, width: int, length: int, itemsize: int, norms: int) -> Cost:
    """Costs of a unit whose every residual unit has `norms` weights in its norms."""
    match unit:
        case Layer():
            parts = [mixer_cost(unit.mixer, width, length, itemsize)]
        case Beside():
            parts = [mixer_cost(mixer, width, length, itemsize) for mixer in unit.branches]
            parts.append(fuse_cost(unit.fuse, len(unit.branches), width, length, itemsize))
        case Reuse():
            return sum_costs(
                [unit_cost(each, width, length, itemsize, norms) for each in unit.body], unit.times
            )
    return sum_costs([*parts, Cost(params=norms, flops=0, state_bytes=0, decode_bytes=norms * itemsize)])


def fuse_cost(fuse: Fuse, branches: int, width: int, length: int, itemsize: int) -> Cost:
    """A mean has a norm for each branch, a gate a score for each branch, a concatenation one matrix."""
    params = {
        "sum": 0,
        "mean": branches * width,
        "gate": branches * width,
        "concat": branches * width * width,
    }[fuse]
    flops = 2 * length * params if fuse in ("gate", "concat") else 0
    return Cost(params=params, flops=flops, state_bytes=0, decode_bytes=params * itemsize)


def sum_costs(costs: list[Cost], times: int = 1) -> Cost:
    """Costs of modules applied `times` times: their weights are counted once and read every time."""
    return Cost(
        params=sum(cost.params for cost in costs),
        flops=times * sum(cost.flops for cost in costs),
        state_bytes=times * sum(cost.state_bytes for cost in costs),
        decode_bytes=times * sum(cost.decode_bytes for cost in costs),
        idle_params=sum(cost.idle_params for cost in costs),
    )
