"""The table of money rules in docs/architecture.md names every mutant with the test that must notice it."""

import subprocess
from pathlib import Path

import pytest

from tests.mutants.run import RULES, read_mutant

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "tests" / "mutants").glob("*.patch"))


@pytest.mark.parametrize("path", PATCHES, ids=[path.stem for path in PATCHES])
def test_mutant_stands_in_the_table_with_its_rule_and_test(path: Path) -> None:
    mutant = read_mutant(path)
    name, test = mutant.test.split("::")
    (row,) = [line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if path.name in line]
    assert row.startswith(f"| {mutant.rule} |")
    assert f"`{name.removeprefix('tests/')}`" in row
    assert f"`{test}`" in row


@pytest.mark.parametrize("path", PATCHES, ids=[path.stem for path in PATCHES])
def test_mutant_applies_to_the_sources_as_they_are(path: Path) -> None:
    tried = subprocess.run(["git", "apply", "--check", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert (tried.returncode, tried.stderr) == (0, "")


def test_every_rule_has_a_mutant() -> None:
    assert {read_mutant(path).rule for path in PATCHES} == set(RULES)
