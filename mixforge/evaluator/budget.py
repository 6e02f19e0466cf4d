"""What every candidate of a campaign is given: tasks with recipes, a seed, a deadline, a workload to time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from mixforge.evaluator.evaluation import Workload
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.tables import read_record, refuse_unknown
from mixforge.evaluator.task import Task
from mixforge.evaluator.tasks import TASKS
from mixforge.search_space.mixer import BACKENDS, Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Two evaluations are comparable when their budgets have one digest."""

    tasks: tuple[Task, ...]
    """In the order of their names."""
    workload: Workload = field(default_factory=Workload)
    context: int = 2048
    """Tokens at which FLOPs, state bytes and decode bytes are stated."""
    seed: int = 0
    deadline_s: float = 600.0
    """Seconds for all the tasks of one candidate together."""
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        if not 1 <= self.context <= 16_777_216:
            raise ValueError(f"context {self.context} is not between 1 and 16777216 tokens")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not between 0 and 2**63 - 1")
        if not 0 < self.deadline_s <= 31_536_000:
            raise ValueError(f"deadline_s {self.deadline_s:g} is not above 0 and at most 31536000 (a year)")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks {', '.join(names)}: a task is given twice")
        object.__setattr__(self, "tasks", tuple(sorted(self.tasks, key=lambda task: task.name)))

    @classmethod
    def from_tables(cls, evaluation: Mapping[str, object], tasks: Mapping[str, object], seed: int) -> Budget:
        """The budget that a campaign's [evaluation] and [tasks.*] tables say.

        Raises ValueError for an unknown key or task (with the nearest known one), a value of the wrong type
        or out of range, and text that cannot be read.
        """
        known = ("context", "deadline_s", "backend", "workload")
        refuse_unknown(evaluation, known, "[evaluation]")
        refuse_unknown(tasks, TASKS, "[tasks]")
        workload = read_record(
            Workload, _table(evaluation.get("workload", {}), "[evaluation.workload]"), "[evaluation.workload]"
        )
        plain = {key: value for key, value in evaluation.items() if key != "workload"}
        settings = read_record(_Settings, plain, "[evaluation]")
        built = tuple(_task(name, _table(table, f"[tasks.{name}]")) for name, table in tasks.items())
        return cls(
            tasks=built,
            workload=workload,
            context=settings.context,
            deadline_s=settings.deadline_s,
            backend=settings.backend,
            seed=seed,
        )

    def why_unasked(self, prefix: int) -> str | None:
        """None, or a sentence on the first task that asks nothing behind a prefix of so many tokens."""
        if prefix == 0:
            return None
        reasons = (task.why_unasked(prefix) for task in self.tasks)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def canonical_json(self) -> str:
        """All that decides what an evaluation finds, as JSON with sorted keys."""
        settings = {
            "tasks": {task.name: task.identity() for task in self.tasks},
            "workload": dataclasses.asdict(self.workload),
            "context": self.context,
            "seed": self.seed,
            "deadline_s": self.deadline_s,
            "backend": self.backend,
        }
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical_json.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """The plain keys of [evaluation]."""

    context: int = 2048
    deadline_s: float = 600.0
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        Budget(tasks=(), context=self.context, deadline_s=self.deadline_s, backend=self.backend)


def _task(name: str, table: Mapping[str, object]) -> Task:
    where = f"[tasks.{name}]"
    values = dict(table)
    if "training" in values:
        inside = f"[tasks.{name}.training]"
        values["training"] = read_record(Recipe, _table(values["training"], inside), inside)
    task = read_record(TASKS[name], values, where)
    try:
        task.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return task


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; write a table")
    return value
