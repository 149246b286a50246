"""Each kind of break that the audit can find says what it is, and the operations page says what to do about it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from paycore.domain import audit
from paycore.domain.audit import AuditKind, PendingKind

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize("kind", AuditKind)
def test_kind_of_break_is_on_the_operations_page(kind: AuditKind) -> None:
    assert f"`{kind.value}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("enumeration", [AuditKind, PendingKind])
def test_kind_has_a_meaning_of_one_line(enumeration: type[AuditKind | PendingKind]) -> None:
    (block,) = [
        node
        for node in ast.parse(inspect.getsource(audit)).body
        if isinstance(node, ast.ClassDef) and node.name == enumeration.__name__
    ]
    meanings = [
        (name.targets[0], said.value.value)
        for name, said in zip(block.body[1::2], block.body[2::2], strict=True)
        if isinstance(name, ast.Assign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant)
    ]
    assert len(meanings) == len(enumeration)
    assert all(str(said).endswith(".") and "\n" not in str(said) for _, said in meanings)
