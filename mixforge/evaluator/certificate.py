"""The solvability certificate of mqar: what known architectures reach in small, stored settings.

A task can be believed where it tells apart what is known to differ. `mqar_certificate.toml` holds cases: an
architecture, a setting, a bound, and the recall that was measured on two seeds.

Every case is within the laptop budget: a width of its space, its steps and its rate. There attention recalls 14
pairs, and a mixer with sixteen states of 4 by 8 numbers falls from all of 6 pairs to none of 14, where one of the
same rule with two states of 32 by 64 still recalls 10. A small state also learns more slowly, so what is certified
is what this budget shows, not what no training could bring.

    python -m mixforge.evaluator.certificate           measure every case again; exit status 1 where one fails
    python -m mixforge.evaluator.certificate --write   and store what was measured
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.evaluation import Environment
from mixforge.evaluator.tables import read_record
from mixforge.evaluator.tasks.mqar import Mqar
from mixforge.search_space.notation import parse

PATH = Path(__file__).parent / "tasks" / "mqar_certificate.toml"
SEEDS = (0, 1)
_STEPS = 150
_RATE = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One claim and what was measured for it."""

    says: str
    architecture: str
    vocab: int
    length: int
    pairs: int
    steps: int = _STEPS
    lr: float = _RATE
    at_least: float = 0.0
    at_most: float = 1.0
    recall: tuple[float, ...] = ()
    """On the selection split, one for each of SEEDS."""
    train_s: float = 0.0
    """Processor seconds of one training, the mean over SEEDS."""

    @property
    def task(self) -> Mqar:
        """The setting, with the steps and the rate of the case and the rest of the task's own recipe."""
        training = dataclasses.replace(Mqar().training, steps=self.steps, lr=(self.lr,))
        return Mqar(vocab=self.vocab, length=self.length, pairs=self.pairs, training=training)

    @property
    def holds(self) -> bool:
        return bool(self.recall) and self.at_least <= min(self.recall) and max(self.recall) <= self.at_most


def read_cases(path: Path = PATH) -> tuple[Case, ...]:
    """The stored cases. Raises ValueError where the file is not a certificate."""
    tables = tomllib.loads(path.read_text()).get("case")
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ValueError(f"{path} holds no [[case]] tables")
    return tuple(read_record(Case, table, f"{path.name} case {index}") for index, table in enumerate(tables))


def measure(case: Case, seeds: tuple[int, ...] = SEEDS) -> Case:
    """The case with recall and time measured here and now.

    Raises RuntimeError where a training does not end well.
    """
    started = time.process_time()
    recall = []
    for seed in seeds:
        evaluation = evaluate(parse(case.architecture), Budget(tasks=(case.task,), seed=seed))
        if evaluation.recall is None:
            raise RuntimeError(f"{case.architecture}: {evaluation.outcome}, {evaluation.reason}")
        recall.append(round(evaluation.recall, 4))
    seconds = (time.process_time() - started) / len(seeds)
    return dataclasses.replace(case, recall=tuple(recall), train_s=round(seconds, 1))


def certificate_text(cases: tuple[Case, ...], where: Environment) -> str:
    """The certificate as TOML."""
    head = [
        "# What known architectures reach on mqar. Written by",
        "#     python -m mixforge.evaluator.certificate --write",
        f"# on {where.device}, {where.threads} thread, torch {where.torch}, mixforge {where.mixforge}.",
        f"# {_STEPS} steps of {Mqar().training.batch} sequences at a rate of {_RATE:g}, but where a case says other.",
        f"# Recall on the selection split for seeds {', '.join(map(str, SEEDS))}; train_s in processor seconds.",
    ]
    return "\n".join(head) + "\n" + "".join(_table(case) for case in cases)


def _table(case: Case) -> str:
    lines = ["", "[[case]]"]
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if value != field.default:
            written = f'"{value}"' if isinstance(value, str) else value
            lines.append(f"{field.name} = {list(written) if isinstance(written, tuple) else written}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixforge.evaluator.certificate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="store what was measured")
    is_to_write = parser.parse_args(arguments).write
    torch.set_num_threads(1)
    cases = []
    for stored in read_cases():
        case = measure(stored)
        cases.append(case)
        verdict = "holds" if case.holds else "FAILS"
        sys.stdout.write(
            f"{verdict}  {case.says}: {case.architecture}, {case.pairs} pairs: recall {case.recall}, "
            f"{case.train_s} s\n"
        )
        sys.stdout.flush()
    if is_to_write:
        PATH.write_text(certificate_text(tuple(cases), environment()))
    return 0 if all(case.holds for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
