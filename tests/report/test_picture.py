"""The picture is well-formed, has a mark for every candidate, and names the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from mixforge.report.picture import Axis, picture
from mixforge.report.quantity import show

if TYPE_CHECKING:
    from mixforge.report.findings import Candidate
    from tests.report.conftest import MadeUp

SVG = "{http://www.w3.org/2000/svg}"


def _classes(text: str, tag: str) -> list[str]:
    return [node.get("class", "") for node in ElementTree.fromstring(text).iter(SVG + tag)]


def test_every_candidate_has_a_mark(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(60).findings()
    text = picture(found)
    marks = _classes(text, "circle") + _classes(text, "path")
    # Each role that occurs has one mark more, in the legend.
    front = [each for each in found.front if each.arm != "baseline"]
    assert sum(name == "front" for name in marks) == len(front) + 1
    assert sum(name.startswith("baseline") for name in marks) == len(found.baselines) + 1
    words = [node.text for node in ElementTree.fromstring(text).iter(SVG + "text")]
    assert {each.name for each in found.baselines} <= set(words)
    assert words[0] is not None
    assert words[0].startswith("laptop <&>: ")


def test_marks_stay_inside(made_up: Callable[[int], MadeUp]) -> None:
    root = ElementTree.fromstring(picture(made_up(60).findings(), y="params", x="decode_ms"))
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for node in root.iter(SVG + "line"):
        assert all(0 < float(node.get(end, "nan")) < width for end in ("x1", "x2"))
    for node in root.iter(SVG + "circle"):
        assert 0 < float(node.get("cx", "nan")) < width
        assert 0 < float(node.get("cy", "nan")) < height


def test_figures_that_cannot_be_drawn_are_refused(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(40).findings()
    with pytest.raises(ValueError, match="unknown figure 'speed'"):
        picture(found, y="speed")
    with pytest.raises(ValueError, match="needs two figures"):
        picture(found, y="recall", x="recall")
    bare = tuple(
        replace(each, trial=replace(each.trial, figures={"recall": 0.5})) for each in found.candidates
    )
    with pytest.raises(ValueError, match="no candidate of"):
        picture(replace(found, candidates=bare), y="recall", x="params")


def test_one_candidate_or_equal_ones_can_be_drawn(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(40).findings()
    one = picture(replace(found, candidates=found.candidates[:1]))
    assert "NaN" not in one
    assert "laptop &lt;&amp;&gt;: 1 architecture, " in one
    assert picture(replace(found, candidates=found.candidates[:1] * 2)).count('class="stairs"') == 1


def _at(like: Candidate, each: Candidate, *, away: float) -> Candidate:
    """A candidate where another one is, or a share of its figures away."""
    figures = {name: value * (1 + away) for name, value in like.trial.figures.items()}
    return replace(each, trial=replace(each.trial, figures=figures))


def test_baselines_in_one_place_or_near_it_can_be_read(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(60).findings()
    named = {each.name: each for each in found.baselines}
    moved = {
        "mamba2": _at(named["hybrid_3to1"], named["mamba2"], away=0.0),
        "gdn": _at(named["griffin"], named["gdn"], away=0.01),
    }
    crowded = replace(found, candidates=tuple(moved.get(each.name or "", each) for each in found.candidates))
    texts = {node.text: node for node in ElementTree.fromstring(picture(crowded)).iter(SVG + "text")}
    assert "hybrid_3to1, mamba2" in texts
    assert not {"hybrid_3to1", "mamba2"} & texts.keys()
    near = [texts[name] for name in ("griffin", "gdn")]
    ys = [float(node.get("y", "nan")) for node in near]
    # One line of text is 14 pixels high; beside each other they would be held by different ends.
    assert abs(ys[0] - ys[1]) >= 14 or near[0].get("text-anchor") != near[1].get("text-anchor")


@pytest.mark.parametrize(
    "values", [(1.0, 2.0), (0.001, 900.0), (-3.0, 5.0), (2.0, 2.0), (0.0, 0.0), (1e6, 1.1e6)]
)
def test_ticks_are_few_round_and_inside(values: tuple[float, float]) -> None:
    axis = Axis.over("params", values, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert ticks == sorted(ticks)
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in ticks)
    assert all(math.isfinite(axis.at(value)) for value in values)


@pytest.mark.parametrize(
    ("figure", "value", "spread", "text"),
    [
        ("params", 1_234_567, None, "1.23 M"),
        ("params", 999, None, "999"),
        ("peak_bytes", 12_300_000_000, None, "12.3 GB"),
        ("state_bytes", 0, None, "0 B"),
        ("flops", 5e12, None, "5.00 TFLOP"),
        ("bits_per_byte", 2.3456, None, "2.35 bit/byte"),
        ("decode_ms", 0.41234, 0.022, "0.412 ± 0.0110 ms"),
        ("recall", 1.0, None, "1.00"),
        ("prefill_ms", 12345.6, None, "12,346 ms"),
        ("train_ms", 123.4, 2, "123 ± 1.00 ms"),
        ("train_ms", 1.5e-5, None, "1.50e-05 ms"),
    ],
)
def test_quantities(figure: str, value: float, spread: float | None, text: str) -> None:
    assert show(figure, value, spread) == text
