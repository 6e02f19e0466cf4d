"""The tuner's choice, with times and errors that are made up, and the file that it keeps."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mixforge.kernels import blocks, tuning
from mixforge.kernels.blocks import Config, ShapeClass, choose, read_tuned, trying, write_tuned
from mixforge.kernels.launch import recording

SHAPE = ShapeClass("linear_scan", torch.bfloat16, 128, 128, "scalar, delta")
OTHER = ShapeClass("norm_forward", torch.bfloat16, 2048)
DEVICE = "a device"
A, B, C = (Config({"BV": size}) for size in (64, 32, 16))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXFORGE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "tuned.json"


def select(**found: float | str) -> tuning.Tuned:
    named = {"A": A, "B": B, "C": C}
    times = {named[name].text: value for name, value in found.items()}
    return tuning.select(SHAPE, [named[name] for name in found], lambda config: times[config.text])


def test_the_fastest_that_is_right_is_taken() -> None:
    made = select(A=2.0, B="output 0 is wrong", C=1.0)
    assert (made.best, made.best_ms, made.default_ms, made.ratio) == (C, 1.0, 2.0, 2.0)
    assert made.dropped == ((B, "output 0 is wrong"),)


def test_the_default_stays_unless_another_is_faster_by_more_than_noise() -> None:
    assert select(A=1.00, B=0.99).best == A
    assert select(A=1.00, B=0.90).best == B


def test_a_default_that_is_wrong_is_replaced_by_whatever_is_right() -> None:
    made = select(A="gradient 1 is wrong", B=3.0)
    assert (made.best, made.default_ms, made.ratio) == (B, None, None)
    nothing = select(A="wrong", B="AcceleratorError: illegal access")
    assert (nothing.best, nothing.best_ms) == (None, None)
    assert len(nothing.dropped) == 2


def test_candidates_are_the_default_first_and_each_once() -> None:
    found = tuning.candidates(SHAPE, "sm_90")
    assert found[0] == blocks.from_table(SHAPE, "sm_90")
    assert len(found) == len({config.text for config in found}) > 3
    assert {config.warps for config in found} <= set(tuning.WARPS)
    assert {config.stages for config in found} <= set(tuning.STAGES)
    assert {config.registers for config in found} == {0, tuning.FEWER_REGISTERS}
    assert {config.registers for config in tuning.candidates(SHAPE, "gfx942")} == {0}


@pytest.mark.parametrize(
    ("found", "wrong"),
    [([1.0, 2.0], False), ([1.0, 2.01], False), ([1.0, 3.0], True), ([1.0, math.nan], True)],
)
def test_results_are_held_against_the_reference(found: list[float], wrong: bool) -> None:
    right = {"output 0": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    said = tuning.compare({"output 0": torch.tensor(found)}, right, torch.bfloat16)
    assert (said is not None) == wrong
    assert said is None or said.startswith("output 0 is wrong by ")


def test_shape_classes_are_those_of_the_cases_and_hold_no_length() -> None:
    found = tuning.shape_classes("sm_90")
    assert SHAPE in found
    assert not any("4096" in shape.name.split()[-1].split("x") for shape in found)


def test_what_is_kept_is_read_again(cache: Path) -> None:
    assert read_tuned(DEVICE) == {}
    write_tuned(DEVICE, {SHAPE.name: B})
    write_tuned(DEVICE, {"other": A})
    write_tuned("another device", {SHAPE.name: C})
    assert read_tuned(DEVICE) == {SHAPE.name: B, "other": A}
    assert read_tuned("another device") == {SHAPE.name: C}
    assert list(cache.parent.iterdir()) == [cache]


def test_the_key_names_device_triton_and_shape_class(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tuned(DEVICE, {SHAPE.name: B})
    (key,) = json.loads(cache.read_text())
    assert key == f"{DEVICE}, Triton {blocks.triton.__version__}"
    assert SHAPE.name == "linear_scan scalar, delta bfloat16 128x128"
    monkeypatch.setattr(blocks.triton, "__version__", "0.0")
    assert read_tuned(DEVICE) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"KEY": 3}',
        '{"KEY": {"x": {"blocks": {"BV": "64"}, "warps": 4, "stages": 2}}}',
        '{"KEY": {"x": {"blocks": {"BV": 64}, "warps": -4, "stages": 2}}}',
        '{"KEY": {"x": {"block": {"BV": 64}}}}',
    ],
)
def test_a_broken_file_is_warned_of_and_the_table_is_used(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text.replace("KEY", blocks.cache_key(DEVICE)))
    with pytest.warns(RuntimeWarning, match="holds no tuned configurations"):
        assert read_tuned(DEVICE) == {}
    write_tuned(DEVICE, {SHAPE.name: B})
    assert read_tuned(DEVICE) == {SHAPE.name: B}


def ask(generation: str = "sm_90") -> Config:
    return choose(SHAPE.kernel, generation, SHAPE.dtype, SHAPE.key, SHAPE.value, SHAPE.variant)


def test_what_was_tuned_goes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Config({"BV": 256})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    write_tuned(DEVICE, {SHAPE.name: tuned})
    try:
        assert ask() == tuned
        assert ask("cpu") != tuned
        # The gate judges what everyone gets, and the tuner what it tries.
        with recording("sm_90"):
            assert ask() != tuned
        with trying({SHAPE: C}) as trial:
            assert ask() == C
        assert trial.asked == {SHAPE: C}
        with trying({}):
            assert ask() == blocks.from_table(SHAPE, "sm_90")
    finally:
        blocks._tuned.cache_clear()


class Bench:
    """In this process, and without a device."""

    made = 0

    def __enter__(self) -> Bench:
        Bench.made += 1
        return self

    def __exit__(self, *_: object) -> None:
        return

    def ask(self, work: object, shape: ShapeClass, cases: tuple[int, ...], config: Config) -> object:
        name = work.__name__  # type: ignore[attr-defined]
        if name == "check":
            return "output 0 is wrong" if config.warps == 8 else None
        assert name == "time_ms"
        assert config.warps != 8, "it was found wrong, and may not be timed"
        return {64: 3.0, 32: 1.0}.get(config.blocks["BV"], 2.0)


def test_what_is_right_is_timed_after_all_of_its_class_were_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_Bench", Bench)
    monkeypatch.setattr(tuning, "generation", lambda: "sm_90")
    monkeypatch.setattr(tuning, "shape_classes", lambda on: {SHAPE: (4,), OTHER: (5,)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)
    told: list[str] = []
    Bench.made = 0
    (found,) = tuning.tune(told.append, only="linear_scan ", jobs=3)
    assert Bench.made == 3
    assert found.default.blocks["BV"] == 64
    assert found.best is not None
    assert found.best.blocks["BV"] == 32
    assert {config.warps for config, _ in found.dropped} == {8}
    assert read_tuned(DEVICE) == {SHAPE.name: found.best}
    assert told[0].startswith(f"1/1 {SHAPE.name}: ")
    with pytest.raises(ValueError, match="no shape class contains 'such'"):
        tuning.tune(told.append, only="such")


def test_blocks_beside_the_default_are_tried_and_none_is_too_small() -> None:
    found = tuning.candidates(SHAPE, "sm_90")
    default = found[0]
    assert {32, 64, 128} <= {config.blocks["BV"] for config in found}
    assert Config({"BV": 2 * default.blocks["BV"]}, 2 * default.warps, default.stages) in found
    assert all(config.blocks["BV"] >= 16 for config in found)


def test_what_is_compiled_wrong_is_dropped_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "generation", lambda: "sm_90")
    shape = ShapeClass("linear_pairs_backward", torch.bfloat16, 128, 128, "scalar, delta")
    (cases,) = (cases for found, cases in tuning.shape_classes("sm_90").items() if found == shape)
    knobs = importlib.import_module("triton").knobs
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        said = tuning.check(shape, cases, Config({"BV": 64}, 4, 2))
    assert said == "fills a buffer again while a product that reads it is under way"


def test_what_was_found_is_kept_where_the_next_class_is_interrupted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(bench: Bench, work: object, shape: ShapeClass, *given: object) -> object:
        if shape == OTHER:
            raise KeyboardInterrupt
        return Bench().ask(work, shape, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "_Bench", type("Stopped", (Bench,), {"ask": stopped}))
    monkeypatch.setattr(tuning, "generation", lambda: "sm_90")
    monkeypatch.setattr(tuning, "shape_classes", lambda on: {SHAPE: (4,), OTHER: (5,)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(lambda line: None, jobs=2)
    assert set(read_tuned(DEVICE)) == {SHAPE.name}


@pytest.mark.parametrize("on", tuning.TARGETS)
def test_what_is_checked_is_what_was_asked_for(on: str) -> None:
    """At fewer sequences and another length, each shape class is still launched."""
    for shape, cases in tuning.shape_classes(on).items():
        for number in cases:
            made = tuning.shorter(tuning.CASES[number], shape, on)
            assert made.sizes["T"] == tuning.CHECKED_LENGTH
            with trying({}) as trial:
                tuning.record(made, on)
            assert shape in trial.asked, f"{shape.name} of {made.label}"
