"""Tree-shaking and writing on a small package made for the test: what is written runs alone, the same."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mixforge.export.call import callables, factor, write
from mixforge.export.source import collect
from mixforge.search_space.part import Part

Load = Callable[..., ModuleType]
_numbers = itertools.count()

OPERATIONS = '''
    """Operations of the toy.

    y = 2 x
    """
    import torch
    from torch import Tensor

    # A bound with a reason.
    _FACTOR = 2.0
    UNUSED = 3


    def _inner(x: Tensor) -> Tensor:
        """Twice x."""
        return x * _FACTOR


    def double(x: Tensor) -> Tensor:
        return _inner(x)


    def unused(x: Tensor) -> Tensor:
        return torch.exp(x)
'''
MIXERS = '''
    """Modules of the toy."""
    import math
    from collections.abc import Callable
    from dataclasses import dataclass

    import torch
    from torch import Tensor, nn
    from {package}.operations import double


    @dataclass
    class At:
        start: int = 0


    def _inner(x: Tensor) -> Tensor:
        """Another _inner than the operations'."""
        é = [_inner.__name__ for _ in range(2)]; return x + len(é) * math.pi


    class Mix(nn.Module):
        """Mixes."""

        def __init__(self, *, width: int, operation: Callable[[Tensor], Tensor], act: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)
            self.operation, self.act = operation, act

        def forward(self, x: Tensor) -> Tensor:
            at = At(start=1)
            x = _inner(self.operation(self.linear(x))) * at.start
            return self.act(x)


'''
UNITS = '''
    """Units of the toy."""
    from torch import Tensor, nn
    from {package}.mixers import Mix


    class Unit(nn.Module):
        def __init__(self, *, inner: nn.Module, name: str = "a", scale: float = 1.0) -> None:
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.inner(x)


    class Stack(nn.Module):
        def __init__(self, *, layers: list[nn.Module]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x


    class Unused(nn.Module):
        pass
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Writes modules of a fresh package and imports one: `package("units", units=text, operations=text)`."""
    name = f"toy{next(_numbers)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def load(wanted: str, **texts: str) -> ModuleType:
        for module, text in texts.items():
            (tmp_path / name / f"{module}.py").write_text(dedent(text).lstrip().replace("{package}", name))
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.{wanted}")

    yield load
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]


def _toy(package: Load) -> tuple[ModuleType, Part]:
    toy = package("units", units=UNITS, mixers=MIXERS, operations=OPERATIONS)

    double = importlib.import_module(f"{toy.__package__}.operations").double

    def unit(width: int, scale: float) -> Part:
        act = Part(nn.PReLU, num_parameters=width)
        return Part(
            toy.Unit, inner=Part(toy.Mix, width=width, operation=double, act=act), name="ü'", scale=scale
        )

    one, two = unit(8, 1.0), unit(8, 0.5)
    return toy, Part(toy.Stack, layers=[*(3 * [one, two]), two, *(2 * [one, *(2 * [two])])])


def _written(part: Part, package: str) -> str:
    source = collect(callables(part), package=package)
    parts = [
        source.imports,
        *(section.text for section in source.sections),
        write(part, source.name, source.taken),
    ]
    return "\n\n\n".join(parts) + "\n"


def _run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "written"}
    sys.modules["written"] = ModuleType("written")
    try:
        exec(compile(text, "written.py", "exec"), names)
    finally:
        del sys.modules["written"]
    return names


def test_written_file_builds_the_same_module(package: Load) -> None:
    toy, part = _toy(package)
    text = _written(part, toy.__package__)
    torch.manual_seed(0)
    searched = part.build()
    torch.manual_seed(0)
    written = _run(text)["build"]()
    x_BD = torch.randn(3, 8)
    assert torch.equal(searched(x_BD), written(x_BD))
    assert list(searched.state_dict()) == list(written.state_dict())
    assert len({id(layer) for layer in written.layers}) == len(part.arguments["layers"])


def test_only_what_is_reached_is_copied_with_comments_and_docstrings(package: Load) -> None:
    toy, part = _toy(package)
    text = _written(part, toy.__package__)
    assert toy.__package__ not in text
    assert "nused" not in text
    assert "UNUSED" not in text
    assert "# A bound with a reason.\n_FACTOR = 2.0" in text
    assert '"""Twice x."""' in text


def test_two_definitions_of_one_name_are_told_apart(package: Load) -> None:
    toy, part = _toy(package)
    names = _run(_written(part, toy.__package__))
    assert float(names["double"](torch.tensor(1.0))) == 2.0
    assert {"_inner", "_inner_operations"} <= set(names)
    assert names["_inner_operations"].__name__ == "_inner_operations"


def test_layout_is_short_lines_and_one_function_for_each_distinct_unit(package: Load) -> None:
    toy, part = _toy(package)
    text = _written(part, toy.__package__)
    assert text.count("operation=double") == 2
    assert "def make_mix() -> Unit:" in text
    assert "def make_mix_2() -> Unit:" in text
    assert "for _ in range(3)" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("items", "factored"),
    [
        ("", ""),
        ("a", "a"),
        ("aaa", "3(a)"),
        ("abab", "2(ab)"),
        ("aabaab", "2(2(a)b)"),
        ("abcabcd", "2(abc)d"),
        ("ababcababc", "2(2(ab)c)"),
    ],
)
def test_factor(items: str, factored: str) -> None:
    def show(item: Any) -> str:
        return item if isinstance(item, str) else f"{item.times}({''.join(map(show, item.items))})"

    assert "".join(map(show, factor(list(items)))) == factored


def test_factor_is_quick_on_the_longest_stack() -> None:
    assert len(factor([f"{number % 7}{number // 5}" for number in range(1024)])) <= 1024


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import numpy as np\n\n\ndef made():\n    return np.zeros(1)\n", r"made .* uses np of numpy"),
        ("def made():\n    return missing\n", r"made .* uses missing, not found"),
        ("from {package} import other\n\n\ndef made():\n    return other\n", r"import other under its own"),
        ("from {package} import other\n\n\ndef made(x):\n    return x + other.x\n", r"not the only x there"),
        (
            "from {package} import other\n\nx = 2\n\n\ndef made():\n    return other.x\n",
            r"not the only x there",
        ),
        ("from {package}.other import x as y\n\n\ndef made():\n    return y\n", r"import y under its own"),
        (
            "from mixforge.search_space.part import Part\n\n\ndef made():\n    return Part\n",
            r"uses Part of mixforge",
        ),
        ("import os\n\n\nclass made:\n    def f(self):\n        return [os for _ in ()]\n", r"uses os of os"),
        ("import subprocess\n\n\ndef made(x=subprocess):\n    return x\n", r"uses subprocess"),
        ("for made in (print,):\n    pass\n", r"outside"),
    ],
)
def test_what_cannot_stand_alone_is_named(package: Load, text: str, complaint: str) -> None:
    toy = package("bad", bad=text, other="x = 1\n")
    with pytest.raises(ValueError, match=complaint):
        collect([toy.made], package=toy.__package__)


def test_a_module_in_front_of_a_name_is_taken_off(package: Load) -> None:
    text = "from {package} import other\n\n\ndef made():\n    é = [other.x, other.x]; return é + [other.x]\n"
    toy = package("bad", bad=text, other="x = 1\n")
    source = collect([toy.made], package=toy.__package__)
    assert [section.text for section in source.sections] == [
        "x = 1",
        "def made():\n    é = [x, x]; return é + [x]",
    ]


def test_a_module_that_only_annotations_name_is_not_copied(package: Load) -> None:
    text = """
        from __future__ import annotations

        from torch import nn

        class Here(nn.Module):
            pass

        class Absent(nn.Module):
            pass

        class Other(nn.Module):
            pass

        Either = Absent | Other
        Number = int

        def made(a: Here, b: Absent | Other | None, c: Either, d: Number) -> Absent:
            e: Other | Here = Here()
            return e if isinstance(a, Here) else b
    """
    toy = package("hints", hints=text)
    source = collect([toy.made], package=toy.__package__)
    (section,) = source.sections
    assert "import nn" in source.imports
    assert "Absent" not in section.text
    assert "Other" not in section.text
    assert "class Here" in section.text
    # What is no module is copied.
    assert "Number = int" in section.text
    assert (
        "def made(a: Here, b: nn.Module | None, c: nn.Module, d: Number) -> nn.Module:\n"
        "    e: nn.Module | Here = Here()"
    ) in section.text
    made = _run(f"{source.imports}\n\n{section.text}\n")["made"]
    assert made(None, 1, 2, 3) == 1


def test_a_local_name_that_hides_a_renamed_global_is_refused(package: Load) -> None:
    one = "def _same():\n    return 1\n\n\ndef one():\n    return _same()\n"
    two = """
        from {package}.one import one

        def _same():
            return 2

        def made():
            def inner(_same):
                return _same
            return inner(_same()) + one()
    """
    toy = package("two", one=one, two=two)
    with pytest.raises(ValueError, match="both a local and a global"):
        collect([toy.made], package=toy.__package__)


@pytest.mark.parametrize("bad", [lambda x: x, torch.Tensor.exp])
def test_a_root_without_a_top_level_name_is_refused(bad: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="top level"):
        collect([bad])


def test_an_argument_without_a_literal_form_is_refused() -> None:
    part = Part(nn.Linear, in_features=3, out_features=2, dtype=torch.float64)
    source = collect([nn.Linear])
    with pytest.raises(ValueError, match=r"torch\.float64 cannot be written"):
        write(part, source.name, source.taken)
