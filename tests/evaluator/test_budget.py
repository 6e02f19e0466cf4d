"""The budget of a campaign: from its tables, and its digest."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.evaluation import FIGURES
from mixforge.evaluator.tasks import TASKS

_TABLES = """
[evaluation]
context = 1024
[evaluation.workload]
batch = 2
[tasks.mqar]
vocab = 32
length = 16
pairs = 4
[tasks.mqar.training]
steps = 5
batch = 4
lr = [1e-3, 3e-3]
"""


def _budget(text: str = _TABLES, seed: int = 0) -> Budget:
    tables = tomllib.loads(text)
    return Budget.from_tables(tables["evaluation"], tables["tasks"], seed=seed)


def test_tables_say_the_budget() -> None:
    budget = _budget(seed=7)
    assert (budget.context, budget.seed, budget.workload.batch, budget.backend) == (1024, 7, 2, "torch")
    (task,) = budget.tasks
    assert (task.name, task.vocab, task.training.lr) == ("mqar", 32, (1e-3, 3e-3))


def test_laptop_campaign_reads() -> None:
    path = Path(__file__).parents[2] / "examples" / "laptop.toml"
    tables = tomllib.loads(path.read_text())
    budget = Budget.from_tables(tables["evaluation"], tables["tasks"], seed=0)
    assert [task.name for task in budget.tasks] == ["mqar", "text"]


def test_digest_follows_what_decides_a_score() -> None:
    assert _budget().digest == _budget().digest
    others = [
        _budget(seed=1),
        _budget(_TABLES.replace("context = 1024", "context = 1025")),
        _budget(_TABLES.replace("batch = 2", "batch = 3")),
        _budget(_TABLES.replace("pairs = 4", "pairs = 3")),
        _budget(_TABLES.replace("steps = 5", "steps = 6")),
    ]
    assert len({budget.digest for budget in [_budget(), *others]}) == 6


def test_digest_of_text_is_of_its_bytes_and_not_its_place(tmp_path: Path) -> None:
    digests = []
    for name, content in (("a", b"abc" * 1000), ("b", b"abc" * 1000), ("c", b"abd" * 1000)):
        (tmp_path / name).write_bytes(content)
        digests.append(
            Budget.from_tables({}, {"text": {"path": str(tmp_path / name), "length": 8}}, seed=0).digest
        )
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("context = 1024", "contxt = 1024", ["[evaluation]", "'contxt'", "'context'"]),
        ("context = 1024", "context = 0", ["[evaluation]", "context 0", "between 1 and"]),
        ("context = 1024", 'backend = "tritn"', ["backend", "'tritn'", "reference, torch"]),
        ("context = 1024", "deadline_s = 0", ["deadline_s 0", "above 0"]),
        ("batch = 2", "batchs = 2", ["[evaluation.workload]", "'batchs'", "'batch'"]),
        ("batch = 2", 'dtype = "int8"', ["[evaluation.workload]", "'int8'", "bfloat16"]),
        ("[tasks.mqar]\n", "[tasks.mqra]\n[tasks.mqar]\n", ["[tasks]", "'mqra'", "'mqar'"]),
        ("pairs = 4", "pair = 4", ["[tasks.mqar]", "'pair'", "'pairs'"]),
        ("pairs = 4", 'pairs = "4"', ["[tasks.mqar]", "pairs", "'4'", "whole number"]),
        ("pairs = 4", "pairs = 5", ["[tasks.mqar]", "length 16", "20"]),
        ("pairs = 4", "pairs = 16", ["[tasks.mqar]", "pairs 16", "15 keys"]),
        ("steps = 5", "step = 5", ["[tasks.mqar.training]", "'step'", "'steps'"]),
        ("steps = 5\n", "", ["[tasks.mqar.training]", "lacks steps"]),
        ("batch = 2", "batch = 2\n[tasks]\ntext = 3", ["[tasks.text]", "3", "table"]),
    ],
)
def test_errors_name_table_key_value_and_rule(old: str, new: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\[") as caught:
        _budget(_TABLES.replace(old, new, 1))
    for word in words:
        assert word in str(caught.value)


def test_every_task_yields_a_figure_and_stands_without_settings() -> None:
    for name, kind in TASKS.items():
        assert kind.figure in FIGURES
        assert kind().name == name
