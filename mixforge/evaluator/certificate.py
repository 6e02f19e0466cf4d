"""The solvability certificates of the synthetic tasks: what known architectures reach in small, stored settings.

A task can be believed where it tells apart what is known to differ. `tasks/<task>_certificate.toml` holds cases: an
architecture, a setting of the task, a bound, and the score that was measured on two seeds. Every case is trained by
the task's own recipe, the one that a campaign takes which names no other, on one core.

mqar: attention recalls 14 pairs, and a mixer with sixteen states of 4 by 8 numbers falls from all of 6 pairs to none
of 14, where one of the same rule with two states of 32 by 64 still recalls 10. copy: attention copies 32 symbols, a state
of 32 by 64 numbers 16, and sixteen of 2 by 4 most of 8, but less than half of 16. A small state also learns more slowly,
so what is certified is what this budget shows, not what no training could bring. state_tracking: the delta rule solves
parity at four times the training length where its transition may have a negative eigenvalue, and neither it without one
nor attention does. selectiv: a gated delta rule follows most of a grammar's hidden states, a sum that forgets nothing
fewer; over gaps of six blanks it still does, and convolutions of four steps do not.

    python -m mixforge.evaluator.certificate               measure every case again; exit status 1 where one fails
    python -m mixforge.evaluator.certificate copy          of one task
    python -m mixforge.evaluator.certificate --write       and store what was measured
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.evaluation import Environment
from mixforge.evaluator.tables import read_record
from mixforge.evaluator.task import Task
from mixforge.evaluator.tasks import TASKS
from mixforge.search_space.notation import parse

SEEDS = (0, 1)
_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One claim and what was measured for it."""

    says: str
    architecture: str
    setting: Mapping[str, object] = field(default_factory=dict)
    """Of the task, where it is not the default."""
    at_least: float = 0.0
    at_most: float = 1.0
    scores: tuple[float, ...] = ()
    """On the selection split, one for each of SEEDS."""
    train_s: float = 0.0
    """Processor seconds of one training, the mean over SEEDS."""

    @property
    def holds(self) -> bool:
        return bool(self.scores) and self.at_least <= min(self.scores) and max(self.scores) <= self.at_most


def certified() -> tuple[str, ...]:
    """The tasks that have a certificate."""
    return tuple(name for name in TASKS if path_of(name).exists())


def path_of(task: str) -> Path:
    return _FOLDER / f"{task}_certificate.toml"


def task_of(name: str, case: Case) -> Task:
    """The task in the setting of a case. Raises ValueError for a setting that it does not have."""
    return read_record(TASKS[name], case.setting, f"{name}: {case.says}")


def read_cases(task: str) -> tuple[Case, ...]:
    """The stored cases of a task. Raises ValueError where its file is not a certificate."""
    path = path_of(task)
    tables = tomllib.loads(path.read_text()).get("case")
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ValueError(f"{path} holds no [[case]] tables")
    return tuple(read_record(Case, table, f"{path.name} case {index}") for index, table in enumerate(tables))


def measure(task: Task, case: Case, seeds: tuple[int, ...] = SEEDS) -> Case:
    """The case with score and time measured here and now, in that task.

    Raises RuntimeError where a training does not end well.
    """
    started = time.process_time()
    scores = []
    for seed in seeds:
        evaluation = evaluate(parse(case.architecture), Budget(tasks=(task,), seed=seed))
        score: float | None = getattr(evaluation, task.figure)
        if score is None:
            raise RuntimeError(f"{case.architecture}: {evaluation.outcome}, {evaluation.reason}")
        scores.append(round(score, 4))
    seconds = (time.process_time() - started) / len(seeds)
    return dataclasses.replace(case, scores=tuple(scores), train_s=round(seconds, 1))


def certificate_text(name: str, cases: tuple[Case, ...], where: Environment) -> str:
    """The certificate of a task as TOML."""
    training = TASKS[name]().training
    head = [
        f"# What known architectures reach on {name}. Written by",
        f"#     python -m mixforge.evaluator.certificate {name} --write",
        f"# on {where.device}, {where.threads} thread, torch {where.torch}, mixforge {where.mixforge}.",
        f"# {training.steps} steps of {training.batch} sequences at a rate of {training.lr[0]:g}.",
        f"# Scores on the selection split for seeds {', '.join(map(str, SEEDS))}; train_s in processor seconds.",
    ]
    return "\n".join(head) + "\n" + "".join(_table(case) for case in cases)


def _table(case: Case) -> str:
    lines = ["", "[[case]]", f"says = {_toml(case.says)}", f"architecture = {_toml(case.architecture)}"]
    if case.setting:
        lines.append(
            "setting = { "
            + ", ".join(f"{key} = {_toml(value)}" for key, value in case.setting.items())
            + " }"
        )
    for bound, none in (("at_least", 0.0), ("at_most", 1.0)):
        if getattr(case, bound) != none:
            lines.append(f"{bound} = {getattr(case, bound)}")
    lines += [f"scores = {list(case.scores)}", f"train_s = {case.train_s}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixforge.evaluator.certificate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("task", nargs="*", help=f"of {', '.join(certified())}; all of them by default")
    parser.add_argument("--write", action="store_true", help="store what was measured")
    wanted = parser.parse_args(arguments)
    for name in wanted.task:
        if name not in certified():
            parser.error(f"task {name!r} has no certificate; those that have one: {', '.join(certified())}")
    torch.set_num_threads(1)
    all_hold = True
    for name in wanted.task or certified():
        cases = []
        for stored in read_cases(name):
            case = measure(task_of(name, stored), stored)
            cases.append(case)
            verdict = "holds" if case.holds else "FAILS"
            sys.stdout.write(
                f"{verdict}  {name}: {case.says}: {case.architecture}, {dict(case.setting)}: {case.scores}, "
                f"{case.train_s} s\n"
            )
            sys.stdout.flush()
        if wanted.write:
            path_of(name).write_text(certificate_text(name, tuple(cases), environment()))
        all_hold = all_hold and all(case.holds for case in cases)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
