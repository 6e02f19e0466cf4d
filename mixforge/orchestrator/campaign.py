"""A campaign: one TOML file, read once into one frozen value. The README and `examples/` show its keys.

What the file says of the space goes to the grammar, what it says of evaluation and tasks to the budget; this
module reads the rest and refuses what nobody reads.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.evaluation import FIGURES, SCORES, Figure
from mixforge.evaluator.tables import refuse_unknown
from mixforge.orchestrator.samplers import AUTO, SAMPLERS, sampler_for
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.grammar import Space
from mixforge.search_space.model import language_model
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import PRESETS, preset

_KEYS = ("name", "seed", "objectives", "baselines", "space", "search", "evaluation", "tasks")
_SEARCH_KEYS = ("sampler", "trials", "hours", "random_share")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# More objectives than this leave nearly every trial on the front, and exact hypervolume grows out of hand.
_MOST_OBJECTIVES = 4
_MOST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A known architecture that is evaluated first, under the campaign's own budget."""

    name: str
    """As the file gives it: a preset's name or an expression."""
    architecture: Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What to search, by which figures, under which budget, and for how long."""

    name: str
    seed: int
    objectives: tuple[Figure, ...]
    baselines: tuple[Baseline, ...]
    space: Space
    budget: Budget
    sampler: str
    """A name in SAMPLERS; `auto` is resolved."""
    trials: int | None
    """How many architectures to try, baselines apart; None where only the hours bound it."""
    hours: float | None
    """Wall-clock hours of all the campaign's runs together."""
    random_share: float
    """The random arm's share of the trials."""
    text: str
    """The file, verbatim."""
    digest: str
    """sha256 of everything but `trials` and `hours`, so that a campaign can be given more of either."""

    @classmethod
    def read(cls, path: Path) -> Campaign:
        """The campaign in a file. Raises ValueError, which begins with the path, for whatever is wrong with
        it.
        """
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path}: larger than {_MOST_BYTES} bytes, so not a campaign file")
            text = path.read_bytes().decode()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, source: str = "campaign") -> Campaign:
        """The campaign that a TOML text says. Raises ValueError, which begins with `source`."""
        try:
            return _campaign(tomllib.loads(text), text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: {error}") from error


def _campaign(tables: dict[str, object], text: str) -> Campaign:
    refuse_unknown(tables, _KEYS, "the campaign")
    name = _name(tables.get("name"))
    seed = _whole("seed", tables.get("seed", 0), 0, 2**63 - 1)
    search = _table(tables, "search")
    refuse_unknown(search, _SEARCH_KEYS, "[search]")
    trials, hours = _bounds(search)
    space = Space.from_table(_table(tables, "space"))
    # Raises where nothing in the space is legal and within its limits.
    space.draw_legal(random.Random(seed))
    budget = Budget.from_tables(_table(tables, "evaluation"), _table(tables, "tasks"), seed=seed)
    return Campaign(
        name=name,
        seed=seed,
        objectives=_objectives(tables.get("objectives"), budget),
        baselines=_baselines(tables.get("baselines", []), budget),
        space=space,
        budget=budget,
        sampler=_sampler(search.get("sampler", AUTO), trials),
        trials=trials,
        hours=hours,
        random_share=_number("search.random_share", search.get("random_share", 0.1), 0.0, 1.0),
        text=text,
        digest=_digest(tables),
    )


def _table(tables: Mapping[str, object], key: str) -> dict[str, object]:
    table = tables.get(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{key} is {table!r}; write a table, [{key}]")
    return table


def _name(value: object) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"name {value!r} is not a campaign's name; write letters, digits, '.', '-' or '_', at most 100, "
            'such as name = "laptop"'
        )
    return value


def _whole(key: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} {value!r} is not a whole number from {low} to {high}")
    return value


def _number(key: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key} {value!r} is not a number from {low:g} to {high:g}")
    return float(value)


def _bounds(search: Mapping[str, object]) -> tuple[int | None, float | None]:
    trials, hours = search.get("trials"), search.get("hours")
    if trials is None and hours is None:
        raise ValueError("[search] has neither trials nor hours, so it would never end; give one, or both")
    return (
        None if trials is None else _whole("search.trials", trials, 1, 10_000_000),
        None if hours is None else _number("search.hours", hours, 1e-4, 1e6),
    )


def _objectives(value: object, budget: Budget) -> tuple[Figure, ...]:
    names = _strings("objectives", value)
    if not 1 <= len(names) <= _MOST_OBJECTIVES:
        raise ValueError(f"objectives has {len(names)} figures; give 1 to {_MOST_OBJECTIVES}")
    if len(set(names)) < len(names):
        raise ValueError(f"objectives {names} name a figure twice")
    scores = {task.figure for task in budget.tasks}
    for name in names:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"objective {name!r} is no figure{hint} Figures: {', '.join(FIGURES)}")
        if name in SCORES and name not in scores:
            raise ValueError(
                f"objective {name!r} is the score of a task that the campaign does not have; "
                f"its tasks yield: {', '.join(sorted(scores)) or 'nothing'}. Add the task's table, [tasks.…]"
            )
    return tuple(FIGURES[name] for name in names)


def _strings(key: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{key} {value!r} is not a list of names; write {key} = ["...", "..."]')
    return value


def _baselines(value: object, budget: Budget) -> tuple[Baseline, ...]:
    found: list[Baseline] = []
    for name in _strings("baselines", value):
        baseline = Baseline(name=name, architecture=_baseline(name))
        twin = next((other for other in found if other.architecture == baseline.architecture), None)
        if twin is not None:
            raise ValueError(f"baselines {twin.name!r} and {name!r} are the same architecture; keep one")
        try:
            # Written down and not built: what the backend has no kernel for would cost a trial.
            language_model(baseline.architecture, budget.backend)
        except ValueError as error:
            raise ValueError(f"baseline {name!r} cannot be run: {error}, or leave it out") from None
        unasked = budget.why_unasked(baseline.architecture.prefix)
        if unasked is not None:
            raise ValueError(f"baseline {name!r} cannot be scored: {unasked}, or leave it out")
        found.append(baseline)
    return tuple(found)


def _baseline(name: str) -> Architecture:
    if name in PRESETS:
        return preset(name)
    if "(" not in name:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"baseline {name!r} is no preset{hint} Presets: {', '.join(PRESETS)}; "
            "or write an expression, lm(...)"
        )
    architecture = parse(name)
    reason = architecture.why_illegal()
    if reason is not None:
        raise ValueError(f"baseline {name!r} cannot be built: {reason}")
    return architecture


def _sampler(value: object, trials: int | None) -> str:
    if value == AUTO:
        return sampler_for(trials)
    if not isinstance(value, str) or value not in SAMPLERS:
        near = difflib.get_close_matches(str(value), (AUTO, *SAMPLERS), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"search.sampler {value!r} is no sampler{hint} Samplers: {', '.join((AUTO, *SAMPLERS))}"
        )
    return value


def _digest(tables: Mapping[str, object]) -> str:
    search = {key: value for key, value in _table(tables, "search").items() if key not in ("trials", "hours")}
    canonical = json.dumps({**tables, "search": search}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
