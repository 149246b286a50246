"""R9: where amounts, ids and times are handled there is no float at all, but for exceptions named here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "paycore"
MONEY_PACKAGES = ("domain", "store", "usecases", "jobs", "channels")

ALLOWED = {
    ("usecases/group_report.py", "(now_ns - started_ns) / 1000000000.0"): "seconds for a metric",
    ("usecases/pay.py", "max(0, answer_at_ms - self._clock.now_ms()) / 1000"): "seconds for asyncio.wait",
    ("usecases/query.py", "wait_ms / 1000"): "seconds for asyncio.wait",
    ("usecases/pay.py", "_POLL_MS / 1000"): "seconds for asyncio.sleep",
    ("jobs/gate.py", "wait_ms / 1000"): "seconds for asyncio.sleep",
    ("jobs/runner.py", "interval_ms / 1000"): "seconds for asyncio.wait_for",
    ("store/engine.py", "BUSY_TIMEOUT_MS / 1000"): "seconds for sqlite3.connect",
    ("channels/simbank.py", "timeout_ms / 1000"): "seconds for asyncio.timeout",
    ("channels/simbank_books.py", "timeout_ms / 1000"): "seconds for httpx",
    ("store/schema.py", "pathlib.Path(__file__).parent / 'migrations'"): "a path",
}
"""Where a float is made on purpose: (file, expression) -> why it is no money."""

FLOAT_NAMES = {"float", "Decimal", "Fraction", "Float", "Numeric", "REAL", "DOUBLE", "round"}


def floats(tree: ast.AST) -> Iterator[str]:
    """Every expression that is or makes a float: literals, true division, and names that stand for inexact numbers."""
    divisions: list[ast.AST] = [
        node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    ]
    seconds = [node for node in ast.walk(tree) if is_seconds(node)]
    inside = {id(part) for whole in divisions + seconds for part in ast.walk(whole)} - {id(one) for one in divisions}
    for node in ast.walk(tree):
        if id(node) not in inside and is_float(node):
            yield ast.unparse(node)


def is_seconds(node: ast.AST) -> bool:
    """Whether a constant of this name is given a literal: what is named _SECONDS is no money."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant()):
            return name.endswith("_SECONDS")
    return False


def is_float(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
            return True
        case ast.Constant(value=float() | complex()):
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in FLOAT_NAMES
    return False


def found() -> set[tuple[str, str]]:
    return {
        (path.relative_to(SOURCE).as_posix(), expression)
        for package in MONEY_PACKAGES
        for path in sorted((SOURCE / package).rglob("*.py"))
        for expression in floats(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_money_code_has_no_float_but_for_named_seconds() -> None:
    assert found() - ALLOWED.keys() == set()


def test_exceptions_to_the_rule_are_all_still_there() -> None:
    assert ALLOWED.keys() - found() == set()


@pytest.mark.parametrize(
    "code",
    [
        "x = 1.5",
        "X_SECONDS = float(1)",
        "X_MINOR = 0.5",
        "x = 1e3",
        "x = a / b",
        "x /= 2",
        "x = float(a)",
        "x = decimal.Decimal(a)",
        "x = round(a)",
    ],
)
def test_search_finds_each_way_to_a_float(code: str) -> None:
    assert len(list(floats(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code", ["x = a // b", "x = divmod(a, b)", "PAUSE_SECONDS = 0.5", "x = 10**9", "x = 'a / b'", "x: int = 1"]
)
def test_search_leaves_integers_alone(code: str) -> None:
    assert list(floats(ast.parse(code))) == []


def test_compiled_code_declares_no_floating_type() -> None:
    for path in SOURCE.glob("*.p[yx][xd]"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"\b(float|double)\b", line.partition("#")[0]), line
