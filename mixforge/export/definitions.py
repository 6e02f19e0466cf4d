"""The text of a module as definitions and imports, and the two edits that moving a definition may need.

Names are told apart by Python's own symbol tables, so that a local variable is never taken for a global one. What
was read of a text is remembered: exports in one process share most of their definitions.
"""

from __future__ import annotations

import ast
import importlib
import symtable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Key(NamedTuple):
    """A definition's address: its module and its name there."""

    module: str
    name: str


class Imported(NamedTuple):
    """A library's name: `import module as local`, or `from module import name as local`."""

    local: str
    module: str
    name: str | None

    @property
    def statement(self) -> str:
        """The statement, or what stands behind `from module import`."""
        own = self.module.split(".")[0] if self.name is None else self.name
        renamed = "" if self.local == own else f" as {self.local}"
        return f"{self.name or f'import {self.module}'}{renamed}"


@dataclass(frozen=True, slots=True)
class Definition:
    """One top-level class, function or constant, as it stands in its module."""

    key: Key
    line: int
    text: str
    uses: frozenset[str]
    """Names that it takes from its module's scope."""

    @property
    def hints(self) -> frozenset[str]:
        """Those of them that stand in annotations alone, which nothing evaluates."""
        return self.uses - free_names(without_annotations(self.text))


@dataclass(frozen=True, slots=True)
class Module:
    docstring: str
    definitions: dict[str, Definition]
    imports: dict[str, Imported]

    def __contains__(self, name: str) -> bool:
        return name in self.definitions or name in self.imports


@cache
def read_module(module: str) -> Module:
    file = importlib.import_module(module).__file__
    assert file is not None, f"{module} has no source file"
    source = Path(file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    contents = Module(ast.get_docstring(tree) or "", {}, {})
    for node in tree.body:
        for imported in _imported(node):
            contents.imports[imported.local] = imported
        for name in _defined(node):
            text, line = _segment(node, lines)
            contents.definitions[name] = Definition(Key(module, name), line, text, free_names(text))
    return contents


def _imported(node: ast.stmt) -> list[Imported]:
    if isinstance(node, ast.Import):
        # `import a.b` binds a.
        return [Imported(alias.asname or alias.name.split(".")[0], alias.name, None) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [Imported(alias.asname or alias.name, node.module, alias.name) for alias in node.names]
    return []


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _segment(node: ast.stmt, lines: list[str]) -> tuple[str, int]:
    """The statement's lines with its decorators and the comments on top of it; and where they start."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno]), first


@cache
def free_names(text: str) -> frozenset[str]:
    """Names that a definition takes from outside itself, those in annotations included."""
    tables = [symtable.symtable(text, "definition", "exec")]
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned()}
    names: set[str] = set()
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        for symbol in table.get_symbols():
            outside = symbol.is_global() or table.get_type() == "module"
            if symbol.is_referenced() and outside:
                names.add(symbol.get_name())
    return frozenset(names - own)


class _Bare(ast.NodeTransformer):
    """Takes annotations away."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


@cache
def without_annotations(text: str) -> str:
    return ast.unparse(_Bare().visit(ast.parse(text)))


@cache
def rename(text: str, old: str, new: str, key: Key) -> str:
    """Rename a global name in a definition. Raises ValueError where the same name is also a local one."""
    tables = [symtable.symtable(text, "definition", "exec")]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        if table.get_type() != "module" and any(
            s.get_name() == old and s.is_local() for s in table.get_symbols()
        ):
            raise ValueError(
                f"{key.module}.{key.name} cannot be exported: {old} is both a local and a global name there"
            )
    lines = [line.encode() for line in text.split("\n")]
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and node.id == old]
    # From the right, so that the columns of what is still to come stay true.
    for node in sorted(names, key=lambda node: -node.col_offset):
        line, start = lines[node.lineno - 1], node.col_offset
        lines[node.lineno - 1] = line[:start] + new.encode() + line[start + len(old.encode()) :]
    return b"\n".join(lines).decode()


def strip_prefix(text: str, prefix: str) -> tuple[str, set[str]]:
    """`prefix.name` becomes `name`, and the names for which it was done."""
    lines = [line.encode() for line in text.split("\n")]
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == prefix
    ]
    for node in sorted(found, key=lambda node: -node.col_offset):
        line, start = lines[node.lineno - 1], node.col_offset
        lines[node.lineno - 1] = line[:start] + line[start + len(prefix.encode()) + 1 :]
    return b"\n".join(lines).decode(), {node.attr for node in found}
