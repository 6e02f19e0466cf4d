"""Reading a campaign's table into a record."""

from __future__ import annotations

import pytest

from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.tables import read_record


def test_whole_numbers_and_lone_rates_are_taken() -> None:
    recipe = read_record(Recipe, {"steps": 3, "batch": 2, "lr": 1, "clip": 2}, "[t]")
    assert recipe == Recipe(steps=3, batch=2, lr=(1.0,), clip=2.0)
    assert read_record(Recipe, {"steps": 3, "batch": 2, "lr": [1e-3, 3e-3]}, "[t]").lr == (1e-3, 3e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 1}, ["[t]", "'stepz'", "did you mean 'steps'"]),
        ({"steps": 1.5}, ["[t]", "steps", "1.5", "whole number"]),
        ({"steps": True}, ["steps", "True", "whole number"]),
        ({"steps": 0}, ["[t]", "steps 0", "between 1 and"]),
        ({"lr": "3e-3"}, ["lr", "'3e-3'", "a number"]),
        ({"lr": []}, ["lr", "a number"]),
        ({"lr": [1e-3, "x"]}, ["lr", "a list of numbers"]),
        ({"lr": float("nan")}, ["lr", "above 0"]),
        ({"lr": -1}, ["lr", "above 0"]),
        ({"warmup": 1.5}, ["warmup 1.5", "0 to 1"]),
        ({"clip": 0}, ["clip 0", "above 0"]),
        ({"weight_decay": float("inf")}, ["weight_decay inf"]),
    ],
)
def test_errors_name_table_key_value_and_rule(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\[t\]") as caught:
        read_record(Recipe, {"steps": 3, "batch": 2, "lr": 1e-3} | change, "[t]")
    for word in words:
        assert word in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="lacks batch, lr"):
        read_record(Recipe, {"steps": 3}, "[t]")


def test_rate_rises_to_its_highest_and_falls_to_nothing() -> None:
    recipe = Recipe(steps=100, batch=1, lr=(1.0,), warmup=0.1)
    rates = [recipe.rate(step, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert Recipe(steps=1, batch=1, lr=(1.0,), warmup=0.0).rate(0, 1.0) == 1.0
