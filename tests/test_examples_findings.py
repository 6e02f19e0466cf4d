"""The findings: their campaigns, what was measured for them, and the page that shows it say one thing."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from mixforge.orchestrator.campaign import Campaign

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "findings"
CAMPAIGNS = sorted(FOLDER.glob("*.toml"))


@pytest.fixture(scope="module", autouse=True)
def _path() -> None:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))


@pytest.fixture
def run(_path: None) -> ModuleType:
    return importlib.import_module("run")


@pytest.fixture
def draw(_path: None) -> ModuleType:
    return importlib.import_module("draw")


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.stem)
def test_campaigns_can_be_searched(path: Path) -> None:
    campaign = Campaign.read(path)
    assert campaign.name.replace("-", "_") == path.stem
    assert len(campaign.baselines) >= 4
    assert f"mixforge search examples/findings/{path.name}" in campaign.text
    # The search goes on from what is compared: most of it lies in the space.
    inside = [campaign.space.contains(each.architecture) is not None for each in campaign.baselines]
    assert sum(inside) >= len(inside) - 2


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.stem)
def test_everything_compared_was_measured_with_three_seeds(path: Path, run: ModuleType) -> None:
    campaign = Campaign.read(path)
    trainings = [one for one in run.read(run.FIGURES) if one.campaign == campaign.name]
    for baseline in campaign.baselines:
        found = [one for one in trainings if one.architecture == baseline.name]
        assert {one.seed for one in found} >= {0, 1, 2}
        for one in found:
            assert set(one.scores) == {task.figure for task in campaign.budget.tasks}
            # The text of the standard library, and with it the budget, is another one in another Python.
            if "bits_per_byte" not in one.scores:
                assert one.budget == dataclasses.replace(campaign.budget, seed=one.seed).digest


def test_findings_compare_what_the_campaigns_have(draw: ModuleType) -> None:
    known = {
        (campaign.name, each.name)
        for campaign in map(Campaign.read, CAMPAIGNS)
        for each in campaign.baselines
    }
    drawn = {
        (point.campaign, point.architecture)
        for finding in draw.FINDINGS
        for panel in finding.panels
        for series in panel.series
        for point in series.points
    }
    assert drawn == known


def test_the_page_has_the_tables_that_were_measured(run: ModuleType, draw: ModuleType) -> None:
    page = draw.PAGE.read_text()
    assert draw.with_tables(page, run.read(run.FIGURES)) == page
    with pytest.raises(ValueError, match="no place for the table of f1"):
        draw.with_tables("", run.read(run.FIGURES))


def test_the_pictures_are_those_of_what_was_measured(run: ModuleType, draw: ModuleType) -> None:
    trainings = run.read(run.FIGURES)
    page = draw.PAGE.read_text()
    for finding in draw.FINDINGS:
        picture = draw.svg(finding, trainings)
        assert (run.FIGURES.parent / f"{finding.name}.svg").read_text() == picture
        assert f"(findings/{finding.name}.svg)" in page
        root = ET.fromstring(picture)
        classes = [element.get("class") for element in root.iter()]
        points = [point for panel in finding.panels for series in panel.series for point in series.points]
        assert classes.count("one") == 3 * len(points)
        assert trainings[0].device in "".join(root.itertext())


CAMPAIGN = """
name = "small"
objectives = ["recall"]
baselines = ["lm(attn + mlp, width=8)", "lm(conv + mlp, width=8)"]
[space]
start = "lm(attn + mlp, width=8)"
[search]
trials = 1
[tasks.mqar]
vocab = 12
length = 12
pairs = 3
examples = 8
[tasks.mqar.training]
steps = STEPS
batch = 4
lr = 1e-3
"""


def test_trainings_go_on_where_they_stopped_and_those_of_a_changed_campaign_are_made_again(
    tmp_path: Path, run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "findings" / "figures.json"
    campaign = Campaign.parse(CAMPAIGN.replace("STEPS", "2"))
    run.run([campaign], 1, path)
    first = run.read(path)
    assert [one.architecture for one in first] == ["lm(attn + mlp, width=8)", "lm(conv + mlp, width=8)"]
    assert all(0 <= one.scores["recall"] <= 1 and one.train_s > 0 and one.seed == 0 for one in first)
    assert "2/2 small seed 0: lm(conv + mlp, width=8): recall 0." in capsys.readouterr().out

    # Nothing is made twice, another seed is added, what other campaigns measured is kept.
    other = dataclasses.replace(first[0], campaign="other")
    run.write(path, [*first, other])
    run.run([campaign], 2, path)
    assert len(run.read(path)) == 5
    assert [one for one in run.read(path) if one.seed == 0] == [other, *first]

    changed = Campaign.parse(CAMPAIGN.replace("STEPS", "3"))
    run.run([changed], 1, path)
    assert [one.budget == changed.budget.digest for one in run.read(path)] == [False, True, True]

    def fails(*_: object) -> None:
        raise RuntimeError("the power went")

    monkeypatch.setattr(run, "train", fails)
    with pytest.raises(RuntimeError, match="power"):
        run.run([campaign], 1, path)


def test_a_training_that_ends_badly_is_no_figure(run: ModuleType) -> None:
    campaign = Campaign.parse(CAMPAIGN.replace("STEPS", "2"))
    late = dataclasses.replace(campaign.budget, deadline_s=1e-9)
    with pytest.raises(RuntimeError, match=r"small: lm.*timed_out"):
        run.train(campaign, campaign.baselines[0], late)
