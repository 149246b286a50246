"""Finds what every file of a package imports, and judges it by a table of rules.

Sees the imports of .py and .pyi files wherever they stand (in functions, under TYPE_CHECKING), relative
ones, `importlib.import_module` and `__import__` with a literal name, and in .pyx and .pxd files both
`import` and `cimport`. A name that is computed at run time is beyond it.

A *layer* is the first name below the package: a module (`settings`) or a folder (`domain`). The
package's own `__init__` is the layer ``(root)``; the stub of a compiled module is one of its own (`_dedupe.pyi`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

ROOT_LAYER = "(root)"
PYTHON_SUFFIXES = (".py", ".pyi")
CYTHON_SUFFIXES = (".pyx", ".pxd", ".pxi")
# Textual includes would hide imports from this module, and code from its reader.
INCLUDE = "(include)"

_CYTHON_NOISE = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|#[^\n]*|\\\n')
_CYTHON_FROM = re.compile(r"(?:^|[;:])[ \t]*from[ \t]+([.\w]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n;]+)", re.MULTILINE)
_CYTHON_IMPORT = re.compile(r"(?:^|[;:])[ \t]*c?import[ \t]+([^\n;]+)", re.MULTILINE)
_CYTHON_INCLUDE = re.compile(r"^[ \t]*include[ \t]+[\"']", re.MULTILINE)


class Import(NamedTuple):
    """One import: who, where, and the full dotted name of what (names taken from a module included)."""

    file: Path
    layer: str
    line: int
    target: str


class Rules(NamedTuple):
    """What each layer may import. What a table does not name is not allowed."""

    package: str
    layers: Mapping[str, AbstractSet[str]]
    """Layer -> the other layers of the package it may import."""
    outside: Mapping[str, AbstractSet[str]]
    """Distribution's import name -> the layers that may import it."""
    standard_library: Mapping[str, AbstractSet[str]]
    """Layer -> the only modules of the standard library it may import, each with what is below it. Not named: all."""


def collect(source: Path, package: str) -> Iterator[Import]:
    """Yield every import of every file of `source`/`package`, code that protoc generated left out."""
    for file in sorted((source / package).rglob("*")):
        if file.suffix in PYTHON_SUFFIXES and "_pb2" not in file.name:
            found = _python_imports(file.read_text(encoding="utf-8"), _module_of(file, source))
        elif file.suffix in CYTHON_SUFFIXES:
            found = _cython_imports(file.read_text(encoding="utf-8"), _module_of(file, source))
        else:
            continue
        layer = _layer_of(_module_of(file, source)[0], package) + _stub_mark(file)
        yield from (Import(file.relative_to(source), layer, line, target) for line, target in found)


def violations(source: Path, rules: Rules) -> list[str]:
    """Return one line for each import that no rule allows, in the order of files and lines."""
    modules = _own_modules(source, rules.package)
    imports = sorted(set(collect(source, rules.package)))
    return [f"{one.file}:{one.line}: {why}" for one in imports if (why := _judge(one, rules, modules))]


def _judge(one: Import, rules: Rules, modules: AbstractSet[str]) -> str | None:
    """Return what is wrong with an import, or None."""
    if one.layer not in rules.layers:
        return f"no rule for the layer {one.layer}: add it to the table"
    top = one.target.partition(".")[0]
    if top == rules.package:
        return _judge_own(one, rules, modules)
    if top in sys.stdlib_module_names:
        return _judge_standard(one, rules, top)
    if top not in rules.outside:
        return f"no rule for {top}: add it to the table"
    return None if one.layer in rules.outside[top] else f"{one.layer} must not import {top}"


def _judge_standard(one: Import, rules: Rules, top: str) -> str | None:
    if top in rules.outside and one.layer not in rules.outside[top]:
        return f"{one.layer} must not import {top}"
    allowed = rules.standard_library.get(one.layer)
    if allowed is None or any(f"{one.target}.".startswith(f"{module}.") for module in allowed):
        return None
    return f"{one.layer} must not import {one.target}"


def _judge_own(one: Import, rules: Rules, modules: AbstractSet[str]) -> str | None:
    layer = _layer_of(one.target, rules.package)
    if layer != ROOT_LAYER and f"{rules.package}.{layer}" not in modules:
        # `from paycore import __version__`: a name in the package's __init__, not a module.
        layer = ROOT_LAYER
    if layer == one.layer or layer in rules.layers[one.layer]:
        return None
    return f"{one.layer} must not import {layer}"


def _own_modules(source: Path, package: str) -> set[str]:
    """Return the first-level modules and folders of the package, compiled ones included."""
    suffixes = (*PYTHON_SUFFIXES, *CYTHON_SUFFIXES)
    entries = [path for path in (source / package).iterdir() if path.is_dir() or path.suffix in suffixes]
    return {f"{package}.{path.stem}" for path in entries}


def _module_of(file: Path, source: Path) -> tuple[str, str]:
    """Return (dotted name of the module, dotted name of the package that its relative imports start from)."""
    parts = file.relative_to(source).with_suffix("").parts
    if parts[-1] == "__init__":
        return ".".join(parts[:-1]), ".".join(parts[:-1])
    return ".".join(parts), ".".join(parts[:-1])


def _layer_of(module: str, package: str) -> str:
    rest = module.removeprefix(package).lstrip(".")
    return rest.partition(".")[0] or ROOT_LAYER


def _stub_mark(file: Path) -> str:
    """Return ".pyi" for the stub of a compiled module, which is never run."""
    return ".pyi" if file.suffix == ".pyi" and file.with_suffix(".pyx").exists() else ""


def _absolute(name: str, home: str) -> str:
    """Resolve leading dots against the package that the importing module lives in."""
    dots = len(name) - len(name.lstrip("."))
    if dots == 0:
        return name
    base = home.split(".")[: len(home.split(".")) - (dots - 1)]
    return ".".join([*base, *filter(None, [name.lstrip(".")])])


def _python_imports(text: str, module: tuple[str, str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute("." * node.level + (node.module or ""), module[1])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            yield from ((node.lineno, _absolute(name, module[1])) for name in _literal_texts(node.args[:1]))


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def _literal_texts(arguments: Iterable[ast.expr]) -> Iterator[str]:
    for argument in arguments:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def _cython_imports(text: str, module: tuple[str, str]) -> Iterator[tuple[int, str]]:
    """Read Cython by its lines: Python's parser does not know the language, and Cython's is not public."""
    # Blanked, not cut, so that line numbers stay true.
    text = _CYTHON_NOISE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    for found in _CYTHON_FROM.finditer(text):
        origin = _absolute(found.group(1), module[1])
        yield from ((_line(text, found), f"{origin}.{name}") for name in _names(found.group(2)))
    for found in _CYTHON_IMPORT.finditer(text):
        yield from ((_line(text, found), name) for name in _names(found.group(1)))
    yield from ((_line(text, found), INCLUDE) for found in _CYTHON_INCLUDE.finditer(text))


def _names(listing: str) -> list[str]:
    """Return the names of `a, b as c`, brackets or not."""
    return [part.split()[0] for part in listing.strip(" \t()").replace("\n", " ").split(",") if part.strip(" \t()")]


def _line(text: str, found: re.Match[str]) -> int:
    """Return the line of a match, counted from its first letter (the pattern may begin on a line's end)."""
    begin = found.start() + len(found.group()) - len(found.group().lstrip("\n\r\t ;:"))
    return text.count("\n", 0, begin) + 1
