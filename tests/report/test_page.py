"""The page stands alone, says what it leaves out, and shows each figure as it is stored."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from plotly.offline import get_plotlyjs

from mixforge.report.page import MOST_POINTS, page
from mixforge.report.strip import colour, legend, letters, strip
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.notation import parse

if TYPE_CHECKING:
    from tests.report.conftest import MadeUp


class _Reader(HTMLParser):
    """Collects tags with their attributes, and the text of the data script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


@pytest.fixture(scope="module")
def small(made_up: Callable[[int], MadeUp]) -> str:
    return page(made_up(60).findings())


def test_nothing_is_loaded_from_elsewhere(small: str) -> None:
    own = small.replace(get_plotlyjs(), "")
    assert len(small) - len(own) == len(get_plotlyjs())
    assert "http" not in own.replace("http-equiv", "")
    for _, attributes in _Reader(own).tags:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in own


def test_names_that_look_like_html_are_text(small: str) -> None:
    own = small.replace(get_plotlyjs(), "")
    assert "laptop <&>" not in own
    assert "<h1>laptop &lt;&amp;&gt;</h1>" in own
    assert "Test CPU &lt;8 cores&gt;" in own


def test_data_is_what_the_candidates_have(small: str, made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(60).findings()
    data = json.loads(_Reader(small.replace(get_plotlyjs(), "")).data)
    assert len(data["points"]) == len(found.candidates)
    by_number = {point["number"]: point for point in data["points"]}
    for each in found.candidates:
        assert by_number[each.trial.number]["values"] == dict(each.trial.figures)
        assert by_number[each.trial.number]["front"] is each.on_front
    for growth, drawn in zip(found.growth, data["growth"], strict=True):
        assert drawn["trials"][-1] == len(growth.volumes)
        assert [growth.volumes[number - 1] for number in drawn["trials"]] == drawn["volumes"]
    assert data["tasks"] == ["text", "mqar"]


def test_every_member_and_baseline_has_its_strip(small: str, made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(60).findings()
    shown = {each.trial.digest for each in (*found.front, *found.baselines)}
    assert small.count("<article") == len(shown)
    for digest in shown:
        assert f"<code>{digest}</code>" in small


def test_thousands_of_trials_are_thinned_and_the_page_says_so(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(2500).findings()
    text = page(found)
    points = json.loads(_Reader(text.replace(get_plotlyjs(), "")).data)["points"]
    left_out = len(found.candidates) - len(points)
    assert f"{left_out:,} dominated candidates" in text
    assert sum(point["role"] == "search" for point in points) <= MOST_POINTS
    kept = {point["number"] for point in points}
    assert all(
        each.trial.number in kept for each in found.candidates if each.on_front or each.arm != "search"
    )
    assert len(text) < 10e6


# What the page's script asks of a browser and of plotly, for its first plot alone: values are pixels.
_BROWSER = """
const plots = {};
const axis = { d2p: (value) => value, _length: 800 };
const element_ = (id) => ({ textContent: DATA, value: id, addEventListener() {}, on() {}, ...plots[id] });
globalThis.document = { getElementById: element_, documentElement: {} };
globalThis.window = { innerWidth: 900, matchMedia: () => ({ addEventListener() {} }) };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "" });
globalThis.Plotly = {
  react(id, data) { plots[id] = { data, _fullLayout: { xaxis: axis, yaxis: axis } }; return Promise.resolve(); },
  restyle(id, change) { console.log(JSON.stringify(change)); },
};
"""


def test_baselines_in_one_place_or_near_it_can_be_read() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run the page's script with")
    places = {"hybrid_3to1": (300, 200), "gdn": (600, 300), "mamba2": (301, 202), "griffin": (606, 304)}
    points = [
        {
            "label": name,
            "role": "baseline",
            "values": {"x": x, "y": y},
            "spreads": {},
            "text": {},
            "architecture": "",
        }
        for name, (x, y) in places.items()
    ]
    figure = {"label": "", "unit": "", "better": "lower"}
    data = {
        "points": points,
        "figures": {"x": figure, "y": figure},
        "shown": [],
        "growth": [],
        "tasks": [],
        "curves": [],
    }
    script = files("mixforge.report").joinpath("page.js").read_text(encoding="utf-8")
    asked = f"const DATA = {json.dumps(json.dumps(data))};{_BROWSER}{script}"
    told = subprocess.run(
        [node, "-"], input=asked, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    change = json.loads(told)
    assert change["text"] == [["hybrid_3to1, mamba2", "gdn", "", "griffin"]]
    sides = change["textposition"][0]
    assert sides[0] == "top center"
    assert sides[1] != sides[3]


def test_two_objectives_or_one_draw_too(made_up: Callable[[int], MadeUp]) -> None:
    for objectives in (("bits_per_byte", "decode_ms"), ("decode_ms",)):
        assert '<option value="decode_ms" selected>' in page(made_up(40).findings(objectives))


def test_strip_has_a_cell_for_each_mixer_and_a_unit_for_each_layer() -> None:
    layers = parse("lm(2 * (gdn + swiglu) + (attn | conv) + 3 @ (attn + mlp), width=64)").layers
    drawn = strip(layers)
    assert drawn.count('class="unit"') == 7
    assert drawn.count("<i ") == 8
    assert drawn.count("<sup>3×</sup>") == 2
    assert 'title="layer 1: gdn"' in drawn
    names = re.sub("<[^>]+>", "", legend([layers]))
    assert "linear (gdn)" in names
    assert names.index("attn") < names.index("glu")


def test_each_family_has_its_own_letters_and_those_of_one_initial_their_own_colours() -> None:
    assert len({letters(family) for family in CATALOGUE}) == len(CATALOGUE)
    for initial in {family[0] for family in CATALOGUE}:
        alike = [family for family in CATALOGUE if family[0] == initial]
        assert len({colour(family) for family in alike}) == len(alike)
