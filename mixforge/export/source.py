"""Tree-shaking by source: the definitions that a set of classes and functions reach, as text for one file.

Every name that a definition uses is looked up where Python would look it up: in its own module, then through
that module's imports. Definitions of the package are copied with their comments and docstrings; imports of
`ALLOWED` libraries are kept; anything else is an error, so that what is written runs without the package. A module that
is named in annotations alone is one that this model does not have: it is not copied, and the annotation says nn.Module.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from types import UnionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mixforge.export.definitions import (
    Definition,
    Imported,
    Key,
    free_names,
    read_module,
    rename,
    strip_prefix,
)

# What a standalone file may import: torch, safetensors and these parts of the standard library.
ALLOWED = frozenset(
    [
        "__future__",
        "abc",
        "argparse",
        "collections",
        "dataclasses",
        "functools",
        "hashlib",
        "itertools",
        "json",
    ]
).union(["math", "pathlib", "sys", "typing", "safetensors", "torch"])


@dataclass(frozen=True, slots=True)
class Section:
    """What one module gives to the file."""

    module: str
    docstring: str
    """The module's, without paragraphs that name one of its definitions which the file does not have."""
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """A closed set of definitions: `imports`, then `sections` in an order in which they can be executed."""

    imports: str
    sections: tuple[Section, ...]
    _names: dict[Key, str]

    @property
    def taken(self) -> frozenset[str]:
        """Every name that the definitions and imports bind."""
        words = re.findall(r"\w+", self.imports)
        return frozenset([*self._names.values(), *words])

    def name(self, made: Callable[..., Any]) -> str:
        """How a class or function is called in the file."""
        return torch_name(made) or self._names[key_of(made)]


def torch_name(made: Callable[..., Any]) -> str | None:
    """`nn.Linear`, `F.silu`, `torch.sigmoid`; None for what is not torch's own."""
    name = getattr(made, "__name__", "")
    for prefix, home in (("nn", nn), ("F", F), ("torch", torch)):
        if getattr(home, name, None) is made:
            return f"{prefix}.{name}"
    return None


def key_of(made: Callable[..., Any]) -> Key:
    """Raises ValueError for what has no name at the top level of a module: a lambda, a method, a partial."""
    name = getattr(made, "__qualname__", None)
    if name is None or not name.isidentifier():
        raise ValueError(f"{made!r} cannot be exported: it is not defined at the top level of a module")
    return Key(made.__module__, name)


def collect(
    roots: Iterable[Callable[..., Any]], *, package: str = "mixforge", given: Collection[Key] = ()
) -> Source:
    """Collect what `roots` reach inside `package`.

    Definitions in `given` keep their name and are not copied: the caller writes them. Two definitions of
    one name are told apart by a suffix, the module's name. Raises ValueError, naming the definition, for
    what cannot be copied.
    """
    return _Collector(package, frozenset(given)).run(list(roots))


@dataclass
class _Collector:
    package: str
    given: frozenset[Key]
    found: dict[Key, Definition] = field(default_factory=dict)
    targets: dict[tuple[str, str], Key | Imported | None] = field(default_factory=dict)
    members: dict[tuple[str, str], Key] = field(default_factory=dict)
    """What `module.name` in a definition means, by that definition's module and the bare name."""

    def run(self, roots: list[Callable[..., Any]]) -> Source:
        imported = {_torch_import(name) for name in map(torch_name, roots) if name is not None}
        waiting = [key_of(root) for root in roots if torch_name(root) is None]
        while waiting:
            key = waiting.pop()
            if key in self.found or key in self.given:
                continue
            definition = self.found[key] = self._definition(key)
            hints = definition.hints
            for name in sorted(definition.uses):
                target = self._resolve(key.module, name, used_by=key)
                self.targets[key.module, name] = target
                if isinstance(target, Key):
                    if name in hints and _is_torch_module(target):
                        imported.add(_torch_import("nn"))
                    else:
                        waiting.append(target)
                elif target is not None:
                    imported.add(target)
        names = self._names(imported)
        return Source(_imports(imported), self._sections(names), names)

    def _definition(self, key: Key) -> Definition:
        if not _inside(key.module, self.package):
            raise ValueError(
                f"{key.module}.{key.name} cannot be exported: it is defined outside {self.package}"
            )
        contents = read_module(key.module)
        definition = contents.definitions.get(key.name)
        if definition is None:
            raise ValueError(
                f"{key.module}.{key.name} cannot be exported: no class, function or constant has that name"
            )
        for name in definition.uses & set(contents.imports):
            imported = contents.imports[name]
            home = f"{imported.module}.{imported.name}"
            if imported.name is not None and _inside(home, self.package) and _is_module(home):
                definition = self._without_prefix(definition, name, home)
        return definition

    def _without_prefix(self, definition: Definition, prefix: str, home: str) -> Definition:
        """The definition with `prefix.name`, a name of the module `home`, written as `name`."""
        text, members = strip_prefix(definition.text, prefix)
        uses = free_names(text)
        here = definition.key.module
        for name in members:
            means = self.members.setdefault((here, name), Key(home, name))
            if means != Key(home, name) or name in read_module(here) or name not in uses:
                own = f"{here}.{definition.key.name}"
                raise ValueError(f"{own} cannot be exported: {prefix}.{name} is not the only {name} there")
        return Definition(definition.key, definition.line, text, uses)

    def _resolve(self, module: str, name: str, used_by: Key) -> Key | Imported | None:
        """The definition or library behind a name; None for a builtin."""
        contents = read_module(module)
        if (module, name) in self.members:
            return self.members[module, name]
        if name in contents.definitions:
            return Key(module, name)
        if name not in contents.imports:
            if hasattr(builtins, name) or name in ("__file__", "__name__"):
                return None
            raise ValueError(
                f"{used_by.module}.{used_by.name} cannot be exported: it uses {name}, not found in {module}"
            )
        imported = contents.imports[name]
        if not _inside(imported.module, self.package):
            if imported.module.split(".")[0] in ALLOWED:
                return imported
            raise ValueError(
                f"{used_by.module}.{used_by.name} cannot be exported: it uses {name} of {imported.module}; "
                f"an exported model may import {', '.join(sorted(ALLOWED))}"
            )
        if (
            imported.name is None
            or imported.name != name
            or imported.name not in read_module(imported.module)
        ):
            raise ValueError(
                f"{used_by.module}.{used_by.name} cannot be exported: import {name} under its own name, "
                f"by `from {imported.module} import ...`"
            )
        return self._resolve(imported.module, name, used_by)

    def _names(self, imported: set[Imported]) -> dict[Key, str]:
        """A name for each definition, its own wherever that is free."""
        taken: dict[str, Key | Imported] = {}
        for one in sorted(imported, key=str):
            if taken.setdefault(one.local, one) != one:
                raise ValueError(f"cannot be exported: {one.local} means both {one} and {taken[one.local]}")
        names = {key: key.name for key in self.given}
        taken.update({key.name: key for key in self.given})
        for key in sorted(self.found):
            name = key.name
            if name in taken:
                name = f"{key.name}_{key.module.rsplit('.', 1)[-1]}"
            if name in taken:
                raise ValueError(
                    f"{key.module}.{key.name} cannot be exported: its name is taken by {taken[name]}"
                )
            taken[name] = key
            names[key] = name
        return names

    def _sections(self, names: dict[Key, str]) -> tuple[Section, ...]:
        """Modules in the order of their imports, definitions in that of their module."""
        sections = []
        for module in self._modules_in_order():
            definitions = sorted(
                (d for key, d in self.found.items() if key.module == module), key=lambda d: d.line
            )
            texts = [self._renamed(definition, names) for definition in definitions]
            sections.append(Section(module, self._docstring(module), _join(texts)))
        return tuple(sections)

    def _docstring(self, module: str) -> str:
        contents = read_module(module)
        absent = {name for name in contents.definitions if Key(module, name) not in self.found}
        paragraphs = contents.docstring.split("\n\n")
        return "\n\n".join(p for p in paragraphs if not absent & set(re.findall(r"`(\w+)\b", p)))

    def _modules_in_order(self) -> list[str]:
        modules = {key.module for key in self.found}
        needs = {
            module: modules & {imported.module for imported in read_module(module).imports.values()}
            for module in modules
        }
        ordered: list[str] = []

        def visit(module: str) -> None:
            if module not in ordered:
                for needed in sorted(needs[module]):
                    visit(needed)
                ordered.append(module)

        # What was reached first stands last: the model after its mixers.
        for module in reversed(list(dict.fromkeys(key.module for key in self.found))):
            visit(module)
        return ordered

    def _renamed(self, definition: Definition, names: dict[Key, str]) -> str:
        text = definition.text
        own = names[definition.key]
        if own != definition.key.name:
            text = re.sub(rf"^((?:class|def) ){definition.key.name}\b", rf"\g<1>{own}", text, flags=re.M)
            text = rename(text, definition.key.name, own, definition.key)
        for name in definition.uses:
            target = self.targets[definition.key.module, name]
            if not isinstance(target, Key) or target == definition.key:
                continue
            means = names.get(target, "nn.Module")
            if means != name:
                text = rename(text, name, means, definition.key)
        return re.sub(r"nn\.Module( \| nn\.Module)+", "nn.Module", text)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Its parent is a module and no package.
        return False


def _is_torch_module(key: Key) -> bool:
    """Whether it is a module's class, or a name for one of several."""
    made = getattr(importlib.import_module(key.module), key.name)
    classes = made.__args__ if isinstance(made, UnionType) else (made,)
    return all(isinstance(each, type) and issubclass(each, nn.Module) for each in classes)


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _torch_import(name: str) -> Imported:
    prefix = name.split(".")[0]
    return {
        "torch": Imported("torch", "torch", None),
        "nn": Imported("nn", "torch", "nn"),
        "F": Imported("F", "torch.nn.functional", None),
    }[prefix]


def _imports(imported: set[Imported]) -> str:
    """Import statements, the standard library's first, one for each module."""
    plain = {(one.module, one.statement) for one in imported if one.name is None}
    froms: dict[str, list[str]] = {}
    for one in sorted(imported):
        if one.name is not None:
            froms.setdefault(one.module, []).append(one.statement)
    groups = []
    for libraries in (False, True):
        straight = [text for module, text in sorted(plain) if _is_library(module) == libraries]
        taken = [
            f"from {m} import {', '.join(sorted(n))}"
            for m, n in sorted(froms.items())
            if _is_library(m) == libraries
        ]
        groups.append("\n".join([*straight, *taken]))
    return "\n\n".join(group for group in groups if group)


def _is_library(module: str) -> bool:
    return module.split(".")[0] in ("torch", "safetensors")


def _join(texts: list[str]) -> str:
    """Two blank lines around classes and functions, none between constants."""
    out = texts[0]
    for before, text in pairwise(texts):
        constants = all(re.match(r"(#.*\n)*\w+( *:.*)? *=", t) for t in (before, text))
        out += ("\n" if constants else "\n\n\n") + text
    return out
