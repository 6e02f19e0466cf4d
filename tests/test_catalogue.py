"""The page of the catalogue: texts are legal and train, what it names exists, counts are those of its tables."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import PRESETS, preset
from mixforge.search_space.published import published_names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/catalogue.md").read_text()
MARKS = re.compile(r"`([^`]+)`")


def table(title: str) -> list[dict[str, str]]:
    """The rows of the table below a heading, by the names of its columns."""
    below = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in below.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


A, B = table("A rows"), table("B rows")
RUN, NOT_HERE, OURS = table("Findings, searches and tasks"), table("Not here"), table("Presets")


def architecture(text: str) -> Architecture:
    """Of a preset, of a whole text, or of a mixer before attention, so that a channel mixer has one to stand beside."""
    if text in PRESETS:
        return preset(text)
    return parse(text if text.startswith("lm(") else f"lm({text} + attn, width=64)")


@cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@cache
def is_precise(path: Path) -> bool:
    """Whether a test's file, or one beside it that it takes its inputs from, computes in float64."""
    text = path.read_text()
    beside = [
        path.with_name(f"{name}.py") for name in re.findall(r"^from (test_\w+) import", text, re.MULTILINE)
    ]
    return bool(re.search(r"float64|\.double\(\)", text)) or any(map(is_precise, beside))


TEXTS = sorted({text for row in A + B for text in MARKS.findall(row["text"])})


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_legal_and_the_mixers_train(text: str) -> None:
    read = architecture(text)
    assert read.why_illegal() is None
    # Presets have a test of their own that trains them.
    if text not in PRESETS:
        model = read.build(seed=0).train()
        model(torch.arange(2 * 19).reshape(2, 19)).logsumexp(-1).sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name


def test_what_is_run_is_there() -> None:
    for row in RUN:
        for what in MARKS.findall(row["what"]):
            if what.startswith("mixforge draw "):
                assert what.split()[2] in published_names(), what
            elif what.startswith("mixforge "):
                given = re.findall(r'"(lm\(.*\))"', what) or [what.split()[2]]
                assert architecture(given[0]).why_illegal() is None, what
            elif "/" in what:
                assert (ROOT / what).is_file(), what
            else:
                assert architecture(what).why_illegal() is None, what


def test_tests_exist() -> None:
    for row in A + B + RUN:
        named = MARKS.findall(row["tests"])
        assert named, row["name"]
        for each in named:
            path, function = each.split("::")
            assert function in functions(path), f"{row['name']}: {each}"


@pytest.mark.parametrize("row", A + B, ids=lambda row: row["name"])
def test_an_oracle_is_what_the_tests_are(row: dict[str, str]) -> None:
    folders = {"transformers": "tests/oracle_transformers/", "fla-core": "tests/oracle/"}
    parts = [each.partition(": ") for each in row["oracle"].split("; ")]
    oracles = {oracle: names for oracle, _, names in parts}
    assert oracles.keys() <= {"float64 loop", *folders}
    files = [each.split("::")[0] for each in MARKS.findall(row["tests"])]
    if "float64 loop" in oracles:
        assert any(is_precise(ROOT / file) for file in files)
    for oracle, folder in folders.items():
        held = [file for file in files if file.startswith(folder)]
        assert (oracle in oracles) == bool(held)
        if held:
            text = "".join(file.read_text() for file in sorted((ROOT / folder).glob("*.py")))
            for name in oracles[oracle].split(", "):
                assert re.search(rf"\b{name}(Config|Attention)\b|[\"_]{name}\b", text), name


def test_names_stand_once() -> None:
    names = Counter(row["name"] for row in A + B + RUN + NOT_HERE)
    assert not [name for name, times in names.items() if times > 1]
    names = Counter(row["name"] for row in OURS)
    assert not [name for name, times in names.items() if times > 1]


def test_reasons_are_given() -> None:
    assert all(row["reason"] for row in NOT_HERE)
    assert {row["row"] for row in RUN + NOT_HERE} == {"A", "B"}
    for row in OURS:
        assert row["ours"] or row["missing"], row["name"]
        assert set(MARKS.findall(row["ours"])) <= PRESETS.keys()


def test_counts_are_those_of_the_tables() -> None:
    def parts(rows: list[dict[str, str]], column: str) -> list[int]:
        left = sum(1 for row in rows if row[column])
        return [len(rows) - left, left]

    for mark, said in (("A", A), ("B", B)):
        run = [row for row in RUN if row["row"] == mark]
        missing = sum(1 for row in NOT_HERE if row["row"] == mark)
        counts = [*parts(said, "left out"), *parts(run, "left out"), missing]
        assert f"| {mark} rows | {' | '.join(map(str, [sum(counts), *counts]))} |" in PAGE
    here = [row for row in OURS if row["ours"]]
    counts = [*parts(here, "missing"), len(OURS) - len(here)]
    assert f"| presets | {' | '.join(map(str, [len(OURS), *counts]))} |" in PAGE
