"""A small winner at a larger size: stacked, stretched or widened.

With m residual units and a target of M = s * m of them:

    stack     floor(s) copies of the stack one after another; where M is no multiple of m, the small stack
              stretched by r / m with r = M mod (m * floor(s)) stands at the end
    stretch   the stack is read as runs of h equal units; each run becomes ceil(s * h) of them
    widen     the largest legal width within a budget

Source: Acun, Sinha et al. 2025, Composer (arXiv 2510.00379), its extrapolator: stacking from 6 layers, stretching
from 16 on. Depth may come out above M, by less than one for each run, as every run is rounded up.

Departures: a unit whose weights are applied several times counts as one unit, and its copies have weights of their
own. The widening is ours: Composer takes the width of its target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from typing import Literal

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.genes import Form, GeneValue, genes_of
from mixforge.search_space.genes import replace as with_genes
from mixforge.search_space.heads import default_heads
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.stack import MOST_UNITS, Beside, Layer, Residual, Reuse, Segment, Unit, depth

Growth = Literal["heads", "head_dim"]
GROWTHS: tuple[Growth, ...] = ("heads", "head_dim")

COUNTS = ("heads", "key_heads")
"""Genes that count heads: under `grow="heads"` they grow with the width, but for one head that stays one."""
SIZES = ("head_dim", "key_dim", "value_dim")
"""Genes that say how many channels a head has: under `grow="head_dim"` they grow with the width."""


def stack(architecture: Architecture, factor: float | Fraction) -> Architecture:
    """The architecture about `factor` times as deep, as copies of its stack. Raises ValueError below 1."""
    factor = _factor(factor)
    if factor < 1:
        raise ValueError(f"factor {float(factor):g} is below 1; stack makes a stack deeper, by 1 or more")
    units = architecture.stack
    copies, target = math.floor(factor), round(factor * len(units))
    rest = target - copies * len(units)
    end = _stretched(units, Fraction(rest, len(units))) if rest > 0 else ()
    return _deeper(architecture, copies * units + end)


def stretch(architecture: Architecture, factor: float | Fraction) -> Architecture:
    """The architecture with every run of equal units `factor` times as long, rounded up. Raises ValueError."""
    return _deeper(architecture, _stretched(architecture.stack, _factor(factor)))


def _factor(factor: float | Fraction) -> Fraction:
    if not (math.isfinite(factor) and 0 < factor <= MOST_UNITS):
        raise ValueError(f"factor {factor} is not a number above 0, up to {MOST_UNITS}")
    # 1.1 means eleven tenths, not the float that is nearest to them.
    return factor if isinstance(factor, Fraction) else Fraction(str(factor))


def _stretched(units: tuple[Unit, ...], factor: Fraction) -> tuple[Unit, ...]:
    runs = [(unit, len(list(run))) for unit, run in groupby(units)]
    return tuple(unit for unit, length in runs for _ in range(math.ceil(factor * length)))


def _deeper(architecture: Architecture, units: tuple[Unit, ...]) -> Architecture:
    if depth(units) > MOST_UNITS:
        raise ValueError(
            f"the stack would be {depth(units)} layers deep; at most {MOST_UNITS} are allowed: lower the factor"
        )
    return replace(architecture, stack=units)


def at_width(architecture: Architecture, width: int, grow: Growth = "heads") -> Architecture | None:
    """The architecture at another width, which may be illegal; None where a number of heads is none there.

    Sizes that follow from the width follow from the new one. Those that were given are kept in proportion: under
    `grow="heads"` the numbers of heads are, and the channels of a head stay; under `grow="head_dim"` the channels
    of a head are, and the numbers of heads stay, those that follow from the old width too.

    One head that was given stays one, as it says that there are no several: `key_heads=1`, shared by all heads as
    `kv=mqa` is, and `heads=1` where its channels follow from the width. With channels of its own it is one of several,
    as a share of a layer in `|` is, and grows. What is usual at the old width, such as one head at a width of 32, counts
    as not given.
    """
    if grow not in GROWTHS:
        raise ValueError(f"grow {grow!r} is not one of {', '.join(GROWTHS)}")
    ratio = Fraction(width, architecture.width)
    units: list[Unit] = []
    for unit in architecture.stack:
        scaled = _scaled(unit, architecture.width, ratio, grow)
        if scaled is None:
            return None
        units.append(scaled)
    return replace(architecture, stack=tuple(units), width=width)


def _scaled(unit: Unit, width: int, ratio: Fraction, grow: Growth) -> Unit | None:
    match unit:
        case Layer():
            mixer = _scaled_mixer(unit.mixer, width, ratio, grow)
            return None if mixer is None else Layer(mixer)
        case Beside():
            branches = [_scaled_mixer(mixer, width, ratio, grow) for mixer in unit.branches]
            found = tuple(mixer for mixer in branches if mixer is not None)
            return replace(unit, branches=found) if len(found) == len(branches) else None
        case Reuse() | Segment() | Residual():
            body = [_scaled(each, width, ratio, grow) for each in unit.body]
            inside = tuple(each for each in body if each is not None)
            return replace(unit, body=inside) if len(inside) == len(body) else None


def _scaled_mixer(mixer: Mixer, width: int, ratio: Fraction, grow: Growth) -> Mixer | None:
    genes = genes_of(type(mixer))
    values: dict[str, GeneValue] = {name: getattr(mixer, name) for name in genes}
    changed: dict[str, GeneValue] = {}
    for name in COUNTS if grow == "heads" else SIZES:
        value = values.get(name)
        if isinstance(value, int) and not _stays_one(name, values):
            changed[name] = _whole(value, ratio)
    if grow == "heads":
        for name, value in values.items():
            # gqa(n) has n key/value heads: as many query heads for each as before.
            if isinstance(value, Form) and value.name == "gqa":
                heads = _whole(int(value.arguments[0]), ratio)
                changed[name] = None if heads is None else Form("gqa", (heads,))
    elif "heads" in values and values["heads"] is None:
        changed["heads"] = default_heads(width)
    if any(value is None or not genes[name].has(value) for name, value in changed.items()):
        return None
    return with_genes(mixer, **changed)


def _stays_one(name: str, values: Mapping[str, GeneValue]) -> bool:
    """Whether a gene counts one head that is no share of several."""
    follows = any(name in values and not isinstance(values[name], int) for name in SIZES)
    return values[name] == 1 and (name == "key_heads" or (name == "heads" and follows))


def _whole(value: int, ratio: Fraction) -> int | None:
    scaled = value * ratio
    return int(scaled) if scaled.denominator == 1 else None


def widen(
    architecture: Architecture,
    *,
    params: float | None = None,
    fits: Callable[[Architecture], bool] | None = None,
    grow: Growth = "heads",
    step: int = 16,
    widest: int = 16_384,
) -> Architecture:
    """The architecture at the largest legal width, a multiple of `step`, that keeps to the budget.

    The budget is a number of parameters, or `fits`, which says whether an architecture is inside, such as one that
    predicts its latency; both may be given. It must hold at every width below one at which it holds. Raises
    ValueError where neither is given, or no legal width is inside.
    """
    if params is None and fits is None:
        raise ValueError(
            "widen needs a budget: params=, or fits= that says whether an architecture is inside"
        )

    def inside(found: Architecture) -> bool:
        within = params is None or found.cost(1).params <= params
        return within and (fits is None or fits(found))

    legal: dict[int, Architecture] = {}
    for width in range(step, widest + 1, step):
        found = at_width(architecture, width, grow)
        if found is not None and found.illegality() is None:
            legal[width] = found
        if found is not None and params is not None and found.illegality() is None and not inside(found):
            # Everything wider has more parameters.
            break
    widths = sorted(legal)
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if inside(legal[widths[middle]]) else (low, middle)
    if low == 0:
        smallest = f"; the narrowest, {widths[0]}, is outside of the budget" if widths else ""
        raise ValueError(
            f"no multiple of {step} up to {widest} is a legal width within the budget{smallest}: "
            "give a larger budget, a smaller step or grow='head_dim'"
        )
    return legal[widths[low - 1]]
