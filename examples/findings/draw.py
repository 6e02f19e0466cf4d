"""Makes the pictures and the tables of docs/findings.md from what `run.py` measured.

    python examples/findings/draw.py

Each finding has one picture, docs/findings/<finding>.svg: every training is a ring, the mean over seeds a dot, and a
bar goes from the worst seed to the best. Its table stands in the page between <!-- finding --> and
<!-- end of finding -->.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from run import FIGURES, Training, read

from mixforge.evaluator.evaluation import FIGURES as KNOWN

PAGE = FIGURES.parents[1] / "findings.md"
WIDTH, HEIGHT = 860, 400
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 62, 20, 92, 96, 70
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_STYLE = """
  .ground { fill: #ffffff } .line { stroke: #d5dae0 } .ink { fill: #1b1f24 } .quiet { fill: #5b6570 }
  .c0 { color: #0072b2 } .c1 { color: #d55e00 } .c2 { color: #009e73 } .c3 { color: #aa4499 }
  .mean { fill: currentColor } .bar { stroke: currentColor; stroke-width: 2 }
  .one { stroke: currentColor; fill: none; stroke-width: 1.2 }
  .path { stroke: currentColor; fill: none; stroke-width: 1.6; stroke-opacity: .6 }
  .chance { stroke: #5b6570; stroke-dasharray: 4 4 }
  text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif }
  .small { font-size: 12px } .title { font-size: 15px; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14171a } .line { stroke: #333a42 } .ink { fill: #e8eaed } .quiet { fill: #9aa5b1 }
    .c0 { color: #56b4e9 } .c1 { color: #ff9a4d } .c2 { color: #2fc79a } .c3 { color: #dd99cc }
    .chance { stroke: #9aa5b1 }
  }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What stands at one place of the x axis."""

    label: str
    """With a line break where it takes two lines."""
    campaign: str
    architecture: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one colour; with a name, they are joined and stand in the legend."""

    name: str | None = None
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One score over the x axis."""

    score: str
    heading: str
    x: str = ""
    series: tuple[Series, ...]
    chance: float | None = None
    """Where the dashes are."""
    dashes: str = "what guessing scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    title: str
    panels: tuple[Panel, ...]


def _each(campaign: str, labels: dict[str, str], *, name: str | None = None) -> tuple[Series, ...]:
    """One series: the architectures of one campaign, side by side."""
    points = (
        Point(label=label, campaign=campaign, architecture=architecture)
        for architecture, label in labels.items()
    )
    return (Series(name=name, points=tuple(points)),)


def _mixer(text: str) -> str:
    return f"lm(2 * ({text} + mlp), width=32)"


_F1 = {
    "lm(4 * (gdn + mlp), width=32)": "0 of 4",
    "lm(3 * (gdn + mlp) + attn + mlp, width=32)": "1 of 4",
    "lm(2 * (gdn + mlp + attn + mlp), width=32)": "2 of 4",
    "lm(4 * (attn + mlp), width=32)": "4 of 4",
}
_F6 = {
    _mixer("linear(phi=elu1, norm=denominator, out_norm=none, out_gate=none)"): "linear attention",
    _mixer("linear"): "sum, output gate",
    _mixer("deltanet"): "DeltaNet",
    _mixer("gla(conv=4)"): "GLA",
    _mixer("mamba2"): "Mamba-2",
    _mixer("gdn"): "GDN",
    _mixer("attn"): "attention",
}
_F9 = {
    _mixer(f"linear(rule={rule}, decay={decay}, qk_norm=l2, conv=none, heads=2)"): label
    for rule, decay, label in (
        ("add", "none", "neither"),
        ("add", "scalar", "gate"),
        ("delta", "none", "delta rule"),
        ("delta", "scalar", "both"),
    )
}
_F14 = {
    _mixer("attn"): "attention",
    _mixer("mamba2"): "Mamba-2",
    _mixer("deltanet"): "DeltaNet\nβ < 1",
    _mixer("deltanet(beta=2)"): "DeltaNet\nβ < 2",
    _mixer("gdn"): "GDN\nβ < 1",
    _mixer("gdn(beta=2)"): "GDN\nβ < 2",
}
_S3 = {architecture: label for architecture, label in _F14.items() if "gdn" not in architecture}
_F15 = {
    _mixer("attn"): "attention, a cache that grows",
    _mixer("retnet(heads=1)"): "RetNet, 2,048 numbers a layer",
    _mixer("retnet(heads=4)"): "RetNet, 512",
    _mixer("retnet(heads=16)"): "RetNet, 128",
}
_F22 = {
    "lm(4 * (attn + mlp), width=32)": "attention",
    "lm(2 * (static + mlp + attn + mlp), width=32)": "every other\nlayer static",
    "lm(4 * (static + mlp), width=32)": "static,\n64 taps",
    "lm(4 * (static(window=2) + mlp), width=32)": "static,\n2 taps",
}
_LENGTHS = (8, 16, 32)

FINDINGS = (
    Finding(
        name="f1",
        title="F1: hybrid ratio against recall",
        panels=(
            Panel(
                score="recall",
                heading="recall of 10 pairs, fraction right",
                x="attention layers among GDN layers",
                series=_each("f1-hybrid-ratio", _F1),
                chance=1 / 12,
            ),
            Panel(
                score="bits_per_byte",
                heading="text, bits per byte",
                x="attention layers among GDN layers",
                series=_each("f1-hybrid-ratio", _F1),
            ),
        ),
    ),
    Finding(
        name="f6",
        title="F6: hidden states over gaps of six blanks",
        panels=(
            Panel(
                score="selectivity",
                heading="hidden states named right, fraction",
                series=_each("f6-selectivity", _F6),
                chance=0.456,
                dashes="what the letter by itself gives away",
            ),
        ),
    ),
    Finding(
        name="f9",
        title="F9: the gate and the delta rule",
        panels=(
            Panel(
                score="recall",
                heading="recall of 6 overwritten values, fraction right",
                series=_each("f9-gate-and-delta", _F9),
                chance=1 / 12,
            ),
            Panel(
                score="bits_per_byte",
                heading="text, bits per byte",
                series=_each("f9-gate-and-delta", _F9),
            ),
        ),
    ),
    Finding(
        name="f14",
        title="F14: state tracking at tokens 17 to 64, trained on 16",
        panels=(
            Panel(
                score="tracking",
                heading="parity, fraction right",
                series=_each("f14-state-tracking-parity", _F14),
                chance=1 / 2,
            ),
            Panel(
                score="tracking",
                heading="permutations of three (S3), fraction right",
                series=_each("f14-state-tracking-s3", _S3),
                chance=1 / 6,
            ),
        ),
    ),
    Finding(
        name="f15",
        title="F15: copying against state size",
        panels=(
            Panel(
                score="copying",
                heading="symbols copied, fraction right",
                x="symbols in the string",
                series=tuple(
                    Series(
                        name=label,
                        points=tuple(
                            Point(
                                label=str(length), campaign=f"f15-copying-{length}", architecture=architecture
                            )
                            for length in _LENGTHS
                        ),
                    )
                    for architecture, label in _F15.items()
                ),
                chance=1 / 30,
            ),
        ),
    ),
    Finding(
        name="f22",
        title="F22: static mixing alone and interleaved",
        panels=(
            Panel(
                score="bits_per_byte",
                heading="text, bits per byte",
                series=_each("f22-static-mixing", _F22),
            ),
            Panel(
                score="recall",
                heading="recall of 6 pairs, fraction right",
                series=_each("f22-static-mixing", _F22),
                chance=1 / 8,
            ),
        ),
    ),
)


def values(point: Point, score: str, trainings: Sequence[Training]) -> list[float]:
    """The score of each seed, in the order of seeds."""
    found = sorted(
        (one.seed, one.scores[score])
        for one in trainings
        if (one.campaign, one.architecture) == (point.campaign, point.architecture)
    )
    if not found:
        raise ValueError(
            f"{FIGURES} has no training of {point.architecture} in {point.campaign}: run.py makes it"
        )
    return [value for _, value in found]


def svg(finding: Finding, trainings: Sequence[Training]) -> str:
    """The picture, with light and dark colours."""
    used = [
        one
        for one in trainings
        for panel in finding.panels
        for series in panel.series
        if any(one.campaign == point.campaign for point in series.points)
    ]
    devices = sorted({f"{one.device}, one thread, torch {one.torch}" for one in used})
    seeds = len({one.seed for one in used})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        f"<title>{escape(finding.title)}</title><style>{_STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="ink title" x="{_LEFT}" y="26">{escape(finding.title)}</text>',
    ]
    span = (WIDTH - _LEFT - _RIGHT - _GAP * (len(finding.panels) - 1)) / len(finding.panels)
    for index, panel in enumerate(finding.panels):
        parts += _panel(panel, trainings, _LEFT + index * (span + _GAP), span)
    parts += [
        _text(
            _LEFT,
            HEIGHT - 30,
            f"Rings are {seeds} seeds, dots their means, dashes {finding.panels[0].dashes}. {'; '.join(devices)}.",
            "quiet small",
        ),
        _text(
            _LEFT,
            HEIGHT - 13,
            f"python examples/findings/run.py --only {finding.name}_ && python examples/findings/draw.py",
            "quiet small",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, trainings: Sequence[Training], left: float, span: float) -> Iterator[str]:
    bottom = HEIGHT - _BOTTOM
    every = [
        value
        for series in panel.series
        for point in series.points
        for value in values(point, panel.score, trainings)
    ]
    is_share = KNOWN[panel.score].unit == "fraction"
    low, high = (0.0, 1.0) if is_share else (min(every), max(every))
    ticks = _TICKS if is_share else _round_ticks(low, high)
    if not is_share:
        low, high = min(low, ticks[0]), max(high, ticks[-1])

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    yield _text(left, 52, panel.heading, "ink")
    for tick in ticks:
        across = f'x1="{left}" x2="{left + span:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        yield f'<line class="line" {across}/>'
        yield _text(left - 8, y(tick) + 4, f"{tick:.2f}", "quiet small", anchor="end")
    if panel.chance is not None:
        across = f'x1="{left}" x2="{left + span:.1f}" y1="{y(panel.chance):.1f}" y2="{y(panel.chance):.1f}"'
        yield f'<line class="chance" {across}/>'
    labels = [point.label for point in panel.series[0].points]
    places = [left + span * (index + 0.5) / len(labels) for index in range(len(labels))]
    for place, label in zip(places, labels, strict=True):
        for line, words in enumerate(label.split("\n")):
            yield _text(place, bottom + 18 + 15 * line, words, "ink small", anchor="middle")
    if panel.x:
        yield _text(left + span / 2, bottom + 40, panel.x, "quiet small", anchor="middle")
    named = 0.0
    for number, series in enumerate(panel.series):
        yield f'<g class="c{number}">'
        # Series that share a place stand beside one another.
        shift = 9 * (number - (len(panel.series) - 1) / 2)
        scores = [values(point, panel.score, trainings) for point in series.points]
        at = [(place + shift, y(statistics.mean(found))) for place, found in zip(places, scores, strict=True)]
        if series.name is not None:
            yield '<polyline class="path" points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in at) + '"/>'
            yield f'<circle class="mean" cx="{left + named + 5:.1f}" cy="70" r="5"/>'
            yield _text(left + named + 16, 74, series.name, "ink small")
            named += 34 + 6.6 * len(series.name)
        for (a, b), found in zip(at, scores, strict=True):
            yield f'<line class="bar" x1="{a:.1f}" x2="{a:.1f}" y1="{y(min(found)):.1f}" y2="{y(max(found)):.1f}"/>'
            for value in found:
                yield f'<circle class="one" cx="{a:.1f}" cy="{y(value):.1f}" r="3.2"/>'
            yield f'<circle class="mean" cx="{a:.1f}" cy="{b:.1f}" r="5"/>'
        yield "</g>"


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    """Three to six round numbers that enclose both."""
    step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if (high - low) / step <= 4)
    first, last = int(low // step), int(-(-high // step))
    return tuple(step * number for number in range(first, last + 1))


def _text(x: float, y: float, words: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def table(finding: Finding, trainings: Sequence[Training]) -> str:
    """The scores as a Markdown table: mean over seeds, and from the worst to the best."""
    lines = []
    joined = finding.panels[0].series[0].name is not None
    if joined:
        (panel,) = finding.panels
        lines.append("| " + " | ".join([panel.x, *(series.name or "" for series in panel.series)]) + " |")
        lines.append("|---" * (len(panel.series) + 1) + "|")
        for index, point in enumerate(panel.series[0].points):
            cells = (_spread(values(series.points[index], panel.score, trainings)) for series in panel.series)
            lines.append("| " + " | ".join([point.label, *cells]) + " |")
    else:
        first = finding.panels[0]
        lines.append(
            "| " + " | ".join([first.x or "mixers", *(panel.heading for panel in finding.panels)]) + " |"
        )
        lines.append("|---" * (len(finding.panels) + 1) + "|")
        for point in first.series[0].points:
            label = point.label.replace("\n", " ")
            cells = (_cell(panel, point.architecture, trainings) for panel in finding.panels)
            lines.append(f"| {label}: `{point.architecture}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(panel: Panel, architecture: str, trainings: Sequence[Training]) -> str:
    """What a panel shows of an architecture; nothing where it does not show it."""
    points = (point for point in panel.series[0].points if point.architecture == architecture)
    return next((_spread(values(point, panel.score, trainings)) for point in points), "")


def _spread(found: Sequence[float]) -> str:
    return f"**{statistics.mean(found):.3f}** ({min(found):.3f} to {max(found):.3f})"


def with_tables(page: str, trainings: Sequence[Training]) -> str:
    """The page with each finding's table as it was measured. Raises ValueError where it has no place for one."""
    for finding in FINDINGS:
        place = re.compile(rf"(<!-- {finding.name} -->\n).*?(<!-- end of {finding.name} -->)", re.DOTALL)
        if place.search(page) is None:
            raise ValueError(f"the page has no place for the table of {finding.name}")
        made = table(finding, trainings)
        page = place.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", page)
    return page


def main() -> int:
    trainings = read(FIGURES)
    for finding in FINDINGS:
        (FIGURES.parent / f"{finding.name}.svg").write_text(svg(finding, trainings))
    PAGE.write_text(with_tables(PAGE.read_text(), trainings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
