"""The front of two figures as an SVG picture, for a README or a paper: written here, read by every browser and editor.

Colours follow the reader's light or dark setting. What is drawn is what the page's first plot shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mixforge.evaluator.evaluation import FIGURES
from mixforge.report.findings import Candidate, Findings
from mixforge.report.labels import Box, Label, labels
from mixforge.report.quantity import show
from mixforge.search_space.count import counted

WIDTH, HEIGHT = 860, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 62, 58
_LOG_FROM = 8.0
"""An axis is logarithmic where its largest value is so many times its smallest."""

_STYLE = """
  .ground { fill: #ffffff } .line { stroke: #d5dae0 } .ink { fill: #1b1f24 } .quiet { fill: #5b6570 }
  .search { fill: #9aa5b0; fill-opacity: .6 } .random { stroke: #009e73; stroke-width: 1.6 }
  .front { fill: #0072b2 } .stairs { stroke: #0072b2; stroke-dasharray: 2 4; fill: none; stroke-width: 1.4 }
  .baseline { fill: #d55e00 } .bar-front { stroke: #0072b2 } .bar-baseline { stroke: #d55e00 }
  .rim { stroke: #0072b2; stroke-width: 2 }
  text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif }
  .name { paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-linejoin: round }
  .lead { stroke-width: .8 } .small { font-size: 12px } .title { font-size: 15px; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14171a } .name { stroke: #14171a }
    .line { stroke: #333a42 } .ink { fill: #e8eaed } .quiet { fill: #9aa5b1 }
    .search { fill: #8894a0 } .random { stroke: #2fc79a } .front { fill: #56b4e9 }
    .stairs, .bar-front, .rim { stroke: #56b4e9 } .baseline { fill: #ff9a4d } .bar-baseline { stroke: #ff9a4d }
  }
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """One figure along one side of the picture, from pixel `start` to pixel `end`."""

    figure: str
    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, figure: str, values: Sequence[float], start: float, end: float) -> Axis:
        low, high = min(values), max(values)
        log = low > 0 and high / low > _LOG_FROM
        if log:
            margin = (high / low) ** 0.06
            return cls(figure, low / margin, high * margin, start, end, log)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(figure, low - margin, high + margin, start, end, log)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low / 10)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis: about six."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= 8:
                    break
            return found
        rough = (self.high - self.low) / 8
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def picture(found: Findings, y: str | None = None, x: str | None = None) -> str:
    """The SVG's text: figure `y` up, `x` to the right; the first and the last objective unless they are given.

    Raises ValueError where a figure is unknown, both are the same, or no candidate has both.
    """
    y = y or found.objectives[0]
    x = x or next((name for name in (*reversed(found.objectives), "params") if name != y), "flops")
    for name in (x, y):
        if name not in FIGURES:
            raise ValueError(f"unknown figure {name!r}; there are {', '.join(FIGURES)}")
    if x == y:
        raise ValueError(f"a picture needs two figures, not {x} twice")
    drawn = [each for each in found.candidates if x in each.trial.figures and y in each.trial.figures]
    if not drawn:
        raise ValueError(f"no candidate of {found.campaign.name} has both {x} and {y}")
    across = Axis.over(x, _extent(drawn, x), _LEFT, WIDTH - _RIGHT)
    up = Axis.over(y, _extent(drawn, y), HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        f"<title>{escape(_title(found, drawn))}</title><style>{_STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="ink title" x="{_LEFT}" y="24">{escape(_title(found, drawn))}</text>',
        *_legend(drawn),
        *_axes(across, up),
        *_points(drawn, across, up),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _extent(drawn: Sequence[Candidate], figure: str) -> list[float]:
    """The values of a figure, and the ends of the bars that are drawn."""
    ends = []
    for each in drawn:
        value = each.trial.figures[figure]
        half = each.trial.spreads.get(figure, 0.0) / 2 if _role(each) in ("front", "baseline") else 0.0
        # A bar that would reach 0 does not take its axis there: a logarithm has no 0.
        ends += [value - half if value > half else value, value + half]
    return ends


def _title(found: Findings, drawn: Sequence[Candidate]) -> str:
    front = sum(each.on_front for each in drawn)
    place = "" if found.environment is None else f" on {found.environment.device}"
    return f"{found.campaign.name}: {counted(len(drawn), 'architecture', f'{len(drawn):,}')}, {front} on the front{place}"


def _legend(drawn: Sequence[Candidate]) -> Iterator[str]:
    x = float(_LEFT) + 6
    texts = {"front": "on the front", "search": "search", "random": "random arm", "baseline": "baseline"}
    for role, text in texts.items():
        if any(_role(each) == role for each in drawn):
            yield _mark(role, x, 43, rim=False)
            yield f'<text class="quiet small" x="{x + 11:.0f}" y="47">{text}</text>'
            x += 34 + 6.6 * len(text)


def _axes(across: Axis, up: Axis) -> Iterator[str]:
    for value in across.ticks():
        at = across.at(value)
        yield f'<line class="line" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{HEIGHT - _BOTTOM}"/>'
        text = _tick(across.figure, value)
        yield f'<text class="quiet small" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{text}</text>'
    for value in up.ticks():
        at = up.at(value)
        yield f'<line class="line" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}"/>'
        text = _tick(up.figure, value)
        yield f'<text class="quiet small" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    yield f'<text class="ink" x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">{_label(across.figure)}</text>'
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    yield (
        f'<text class="ink" transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{_label(up.figure)}</text>"
    )


def _label(name: str) -> str:
    figure = FIGURES[name]
    return f"{figure.label}, {figure.unit} ({figure.better} is better)"


def _tick(figure: str, value: float) -> str:
    """A tick has no unit: the axis says it."""
    if FIGURES[figure].unit in ("byte", "weights", "FLOP"):
        return show(figure, value).removesuffix("B").removesuffix("FLOP").strip()
    return f"{value:.6g}"


def _points(drawn: Sequence[Candidate], across: Axis, up: Axis) -> Iterator[str]:
    def place(each: Candidate) -> tuple[float, float]:
        return across.at(each.trial.figures[across.figure]), up.at(each.trial.figures[up.figure])

    yield f'<path class="stairs" d="{_stairs([place(each) for each in drawn], across, up)}"/>'
    for role in ("search", "random", "front", "baseline"):
        for each in drawn:
            if _role(each) == role:
                if role in ("front", "baseline"):
                    yield from _bars(each, role, across, up)
                yield _mark(role, *place(each), rim=each.on_front and role == "baseline")
    taken = [place(each) for each in drawn if each.on_front or each.arm == "baseline"]
    names = [(each.name, place(each)) for each in drawn if each.name is not None]
    # A name may stand a little over the edges of the plot, which are blank.
    frame = Box(left=_LEFT, top=_TOP, right=WIDTH - 4, bottom=HEIGHT - _BOTTOM + 4)
    for label in labels(names, taken, frame):
        yield from _text(label)


def _role(candidate: Candidate) -> str:
    return "front" if candidate.on_front and candidate.arm != "baseline" else candidate.arm


def _mark(role: str, x: float, y: float, rim: bool) -> str:
    if role == "random":
        return f'<path class="random" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
    if role == "baseline":
        ring = " rim" if rim else ""
        return f'<path class="baseline{ring}" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    return f'<circle class="{role}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if role == "front" else 3.2}"/>'


def _bars(candidate: Candidate, role: str, across: Axis, up: Axis) -> Iterator[str]:
    """The interquartile range, half of it to each side."""
    figures, spreads = candidate.trial.figures, candidate.trial.spreads
    x, y = across.at(figures[across.figure]), up.at(figures[up.figure])
    for axis in (across, up):
        half = spreads.get(axis.figure, 0.0) / 2
        if half:
            low, high = axis.at(figures[axis.figure] - half), axis.at(figures[axis.figure] + half)
            ends = (low, y, high, y) if axis is across else (x, low, x, high)
            yield '<line class="bar-{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(role, *ends)


def _stairs(places: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    """The front of the two figures alone, as a path: along the worse side of each step."""
    x_sign = 1 if FIGURES[across.figure].better == "lower" else -1
    # Pixels grow downwards.
    y_sign = -1 if FIGURES[up.figure].better == "lower" else 1
    steps: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (x_sign * place[0], y_sign * place[1])):
        if not steps or y_sign * y < y_sign * steps[-1][1]:
            steps.append((x, y))
    path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}"
    return path + "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])


def _text(label: Label) -> Iterator[str]:
    (x, y), (at_x, at_y) = label.mark, label.at
    if label.ring:
        box = label.box
        end_x = min(max(x, box.left), box.right)
        end_y = min(max(y, box.top), box.bottom)
        yield f'<line class="bar-baseline lead" x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}"/>'
    yield (
        f'<text class="baseline name" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{label.anchor}">'
        f"{escape(label.text)}</text>"
    )
