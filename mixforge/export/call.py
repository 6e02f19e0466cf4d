"""A `Part` as the Python that builds it, laid out to be read.

What stands in a list and is too long for one line becomes a function of its own, written once however
often it is used; equal neighbours become a comprehension, which makes each of them anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixforge.search_space.part import Part

_WIDTH = 100
# An element of a list that is longer than this becomes a function.
_SHORT = 50

Name = Callable[[Callable[..., Any]], str]


def callables(part: Part) -> Iterator[Callable[..., Any]]:
    """Every class and function that a part names, with repeats."""
    yield part.make
    for value in part.arguments.values():
        yield from _callables(value)


def _callables(value: object) -> Iterator[Callable[..., Any]]:
    if isinstance(value, Part):
        yield from callables(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _callables(item)
    elif callable(value):
        yield value


def write(part: Part, name: Name, taken: Collection[str]) -> str:
    """Python text that ends in `def build()`, which makes the part.

    `name` says how a class or function is called in the file; `taken` are names that the text must not
    define. Raises ValueError for an argument that has no literal form.
    """
    writer = _Writer(name, set(taken) | {"build", "layer"})
    body = writer.node(part)
    head = f"def build() -> {name(part.make)}:\n"
    docstring = '    """The architecture with fresh weights, drawn from torch\'s generator."""\n'
    return "\n\n\n".join(
        [*writer.functions, f"{head}{docstring}    return {_layout(body, 4, len('    return '))}"]
    )


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: tuple[tuple[str, _Node], ...]


@dataclass(frozen=True, slots=True)
class _Items:
    items: tuple[_Node | _Repeat, ...]
    brackets: str = "[]"


@dataclass(frozen=True, slots=True)
class _Repeat:
    times: int
    items: tuple[_Node | _Repeat, ...]


_Node = str | _Call | _Items


@dataclass
class _Writer:
    name: Name
    taken: set[str]
    functions: list[str] = field(default_factory=list)
    known: dict[_Call, str] = field(default_factory=dict)

    def node(self, value: object) -> _Node:
        if isinstance(value, Part):
            return _Call(self.name(value.make), tuple((k, self.node(v)) for k, v in value.arguments.items()))
        if isinstance(value, list | tuple):
            brackets = "[]" if isinstance(value, list) else "()"
            return _Items(factor([self._element(item) for item in value]), brackets)
        if callable(value):
            return self.name(value)
        if isinstance(value, str):
            # A JSON string is a Python string, in the quotes that this project writes.
            return json.dumps(value, ensure_ascii=False)
        if value is None or isinstance(value, bool | int | float):
            return repr(value)
        raise ValueError(
            f"{value!r} cannot be written as Python: a part takes numbers, strings, None, parts and lists"
        )

    def _element(self, value: object) -> _Node:
        node = self.node(value)
        if not isinstance(value, Part) or not isinstance(node, _Call) or len(_flat(node)) <= _SHORT:
            return node
        if node not in self.known:
            self.known[node] = self._free(_subject(value))
            head = f"def {self.known[node]}() -> {node.name}:\n    return "
            self.functions.append(head + _layout(node, 4, len("    return ")))
        return f"{self.known[node]}()"

    def _free(self, subject: str) -> str:
        stem = "make_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", subject).lower()
        names = [stem, *(f"{stem}_{number}" for number in range(2, len(self.taken) + 3))]
        name = next(name for name in names if name not in self.taken)
        self.taken.add(name)
        return name


def _subject(part: Part) -> str:
    """What an element is about: its largest part, or what that part only wraps."""
    inside = [value for value in part.arguments.values() if isinstance(value, Part)]
    part = max(inside, key=_size, default=part)
    while len(part.arguments) == 1:
        (only,) = part.arguments.values()
        if not isinstance(only, Part):
            break
        part = only
    return part.make.__name__


def _size(part: Part) -> int:
    return sum(1 for _ in callables(part)) + len(part.arguments)


def factor(items: Sequence[Any]) -> tuple[Any, ...]:
    """Factor repeats: [a, b, a, b, c] gives (2 times (a, b), c). Each place takes what saves most."""
    out: list[Any] = []
    at = 0
    while at < len(items):
        best, times = 0, 1
        for period in range(1, (len(items) - at) // 2 + 1):
            if items[at] != items[at + period]:
                continue
            count = 1
            while items[at : at + period] == items[at + count * period : at + (count + 1) * period]:
                count += 1
            if (count - 1) * period > (times - 1) * best:
                best, times = period, count
        if times > 1:
            out.append(_Repeat(times, factor(items[at : at + best])))
            at += best * times
        else:
            out.append(items[at])
            at += 1
    return tuple(out)


def _layout(node: _Node | _Repeat, indent: int, column: int) -> str:
    """Text of a node that starts at `column` of a line indented by `indent`."""
    flat = _flat(node)
    # One more for the comma or the bracket that may follow.
    if isinstance(node, str) or column + len(flat) + 1 <= _WIDTH:
        return flat
    inner = indent + 4
    pad, end = "\n" + " " * inner, "\n" + " " * indent
    if isinstance(node, _Call):
        lines = [f"{key}={_layout(value, inner, inner + len(key) + 1)}," for key, value in node.arguments]
        return f"{node.name}({pad}{pad.join(lines)}{end})"
    if isinstance(node, _Items) and not _is_comprehension(node):
        lines = [_layout(item, inner, inner) + "," for item in node.items]
        return f"{node.brackets[0]}{pad}{pad.join(lines)}{end}{node.brackets[1]}"
    repeat = node if isinstance(node, _Repeat) else node.items[0]
    assert isinstance(repeat, _Repeat)
    element, over = _loop(repeat)
    text = f"{_layout(element, inner, inner)}{pad}for _ in range({repeat.times})"
    if over is not None:
        text += f"{pad}for layer in {_layout(over, inner, inner + len('for layer in '))}"
    return f"*({pad}{text}{end})" if isinstance(node, _Repeat) else f"[{pad}{text}{end}]"


def _flat(node: _Node | _Repeat) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, _Call):
        return f"{node.name}({', '.join(f'{key}={_flat(value)}' for key, value in node.arguments)})"
    if isinstance(node, _Repeat):
        element, over = _loop(node)
        text = f"{_flat(element)} for _ in range({node.times})"
        return f"*({text} for layer in {_flat(over)})" if over is not None else f"*({text})"
    if _is_comprehension(node):
        return "[" + _flat(node.items[0])[2:-1] + "]"
    comma = "," if node.brackets == "()" and len(node.items) == 1 else ""
    return f"{node.brackets[0]}{', '.join(map(_flat, node.items))}{comma}{node.brackets[1]}"


def _is_comprehension(node: _Items) -> bool:
    return node.brackets == "[]" and len(node.items) == 1 and isinstance(node.items[0], _Repeat)


def _loop(repeat: _Repeat) -> tuple[_Node, _Items | None]:
    """A comprehension's element, and what its inner loop goes over where the repeat has several parts."""
    first = repeat.items[0]
    if len(repeat.items) == 1 and not isinstance(first, _Repeat):
        return first, None
    return "layer", _Items(repeat.items, "()")
