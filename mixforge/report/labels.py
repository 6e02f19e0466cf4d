"""Where names stand beside their marks in a picture: none covers another, and one name is said for marks in one place.

A name is tried on eight sides of its mark, then farther and farther out, where a line leads to it; the first place of the
least cost is taken. Lengths are pixels, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Place = tuple[float, float]

# A letter of 13 pixels in the wider of the fonts that a reader may have.
_LETTER = 7.4
_ASCENT, _DESCENT = 11.0, 3.0
# A mark is as large.
_RADIUS = 7.0
# Marks this near to each other cannot be told apart, so they share a label.
_SAME = 3.0
# How much farther out each ring of places is, and how many there are.
_RING, _RINGS = 17.0, 9
_COSTS = {
    "outside": 1000.0,
    "covers a name": 100.0,
    "nearer to another": 3.0,
    "covers a mark": 2.0,
    "ring": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, frame: Box) -> bool:
        return (
            self.left >= frame.left
            and self.right <= frame.right
            and self.top >= frame.top
            and self.bottom <= frame.bottom
        )

    def distance(self, place: Place) -> float:
        """From a place to the nearest point of the rectangle."""
        x, y = place
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.top - y, 0, y - self.bottom))


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A text, where it stands and what it names."""

    text: str
    mark: Place
    at: Place
    """Where the text is held, on its base line."""
    anchor: Literal["start", "middle", "end"]
    """Which part of the text is held there."""
    ring: int
    """0 beside the mark; farther out a line leads to it."""

    @property
    def box(self) -> Box:
        wide = _LETTER * len(self.text)
        left = self.at[0] - {"start": 0.0, "middle": wide / 2, "end": wide}[self.anchor]
        return Box(left=left, top=self.at[1] - _ASCENT, right=left + wide, bottom=self.at[1] + _DESCENT)


def labels(names: Sequence[tuple[str, Place]], marks: Sequence[Place], frame: Box) -> list[Label]:
    """A label for each name, or for several whose marks lie in one place. `marks`: what had better be seen."""
    joined = _joined(names)
    placed: list[Label] = []
    for text, mark in joined:
        others = [place for _, place in joined if place != mark]

        def cost(label: Label, mark: Place = mark, others: Sequence[Place] = others) -> float:
            box = label.box
            found = {
                "outside": not box.within(frame),
                "covers a name": sum(box.overlaps(other.box) for other in placed),
                "nearer to another": sum(box.distance(place) < box.distance(mark) for place in others),
                "covers a mark": sum(box.distance(place) < _RADIUS for place in marks if place != mark),
                "ring": label.ring,
            }
            return sum(_COSTS[name] * count for name, count in found.items())

        placed.append(min(_places(text, mark, frame), key=cost))
    return placed


def _joined(names: Sequence[tuple[str, Place]]) -> list[tuple[str, Place]]:
    """Names whose marks lie in one place, with commas between them."""
    found: list[tuple[str, Place]] = []
    for text, place in names:
        same = next((n for n, (_, other) in enumerate(found) if math.dist(place, other) <= _SAME), None)
        if same is None:
            found.append((text, place))
        else:
            found[same] = (f"{found[same][0]}, {text}", found[same][1])
    return found


def _places(text: str, mark: Place, frame: Box) -> Iterator[Label]:
    """Where a text may stand, the best first."""
    x, y = mark
    half = _LETTER * len(text) / 2
    # Above and below, a long text is moved along its mark until it is inside.
    middle = min(max(x, frame.left + half), max(frame.right - half, frame.left + half))
    for ring in range(_RINGS):
        out = _RING * ring
        sides: tuple[tuple[float, float, Literal["start", "middle", "end"]], ...] = (
            (middle, y - 12 - out, "middle"),
            (middle, y + 21 + out, "middle"),
            (x + 11 + out, y + 4, "start"),
            (x - 11 - out, y + 4, "end"),
            (x + 9 + out, y - 8 - out, "start"),
            (x - 9 - out, y - 8 - out, "end"),
            (x + 9 + out, y + 17 + out, "start"),
            (x - 9 - out, y + 17 + out, "end"),
        )
        for at_x, at_y, anchor in sides:
            yield Label(text=text, mark=mark, at=(at_x, at_y), anchor=anchor, ring=ring)
