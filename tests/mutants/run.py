"""Breaks each money rule on purpose, in a copy of the tree, and asks the named test to notice.

A mutant is a patch beside this file. Its first lines name the rule, the test that must go red, and what is broken::

    Rule: R1
    Test: tests/integration/test_races.py::test_name
    Breaks: what the patch does to the rule

For each, in a fresh copy: the test must pass as the tree stands, and must fail by an assertion once the patch is
applied. A patch that no longer applies, a test that is red before, errors or is skipped: all are failures of this run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MUTANTS = Path(__file__).parent
COPIED = ("src", "tests", "protos", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
RULES = tuple(f"R{number}" for number in range(1, 10))
TIMEOUT_SECONDS = 300

# pytest's own exit codes: 0 all passed, 1 some failed; anything else means that it did not get so far.
PASSED, FAILED = 0, 1


class Mutant(NamedTuple):
    """One patch with what its first lines say."""

    path: Path
    rule: str
    test: str
    breaks: str


def read_mutant(path: Path) -> Mutant:
    """Read a patch's first lines. Raises ValueError when one is missing."""
    fields = {}
    for line in path.read_text().splitlines():
        if line.startswith(("---", "diff ")):
            break
        name, separator, value = line.partition(": ")
        if separator:
            fields[name] = value.strip()
    missing = {"Rule", "Test", "Breaks"} - set(fields)
    if missing:
        raise ValueError(f"{path.name}: says nothing of {', '.join(sorted(missing))}")
    return Mutant(path, fields["Rule"], fields["Test"], fields["Breaks"])


def copy_tree(folder: Path) -> None:
    """Copy what the tests need, compiled modules and generated stubs included."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        elif source.exists():
            shutil.copy2(source, folder / name)


def run_test(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run one test on the copy; its sources come before the installed ones, in child processes too."""
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def apply(folder: Path, mutant: Mutant) -> None:
    """Apply the patch, and compile anew where it touches Cython. Raises CalledProcessError."""
    subprocess.run(
        ["git", "apply", str(mutant.path)],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    if ".pyx" in mutant.path.read_text():
        for stale in (folder / "src" / "paycore").glob("*.so"):
            stale.unlink()
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )


def complaint(mutant: Mutant) -> str | None:
    """Try one mutant; return why it does not prove its rule, or None."""
    with tempfile.TemporaryDirectory(prefix="paycore-mutant-") as name:
        folder = Path(name)
        copy_tree(folder)
        before = run_test(folder, mutant.test)
        if before.returncode != PASSED or "skipped" in before.stdout.splitlines()[-1]:
            return f"its test does not pass without it\n{before.stdout}{before.stderr}"
        try:
            apply(folder, mutant)
        except subprocess.CalledProcessError as error:
            return f"it does not apply or build\n{error.stdout}{error.stderr}"
        after = run_test(folder, mutant.test)
        if after.returncode == PASSED:
            return "its test stays green"
        if after.returncode != FAILED or " failed" not in after.stdout.splitlines()[-1]:
            return f"its test does not fail, it breaks down\n{after.stdout}{after.stderr}"
    return None


def main() -> int:
    """Try every mutant, or those whose names contain an argument; return the exit code."""
    mutants = [read_mutant(path) for path in sorted(MUTANTS.glob("*.patch"))]
    uncovered = set(RULES) - {mutant.rule for mutant in mutants}
    if uncovered:
        print(f"no mutant for {', '.join(sorted(uncovered))}")
    chosen = [
        mutant for mutant in mutants if not sys.argv[1:] or any(part in mutant.path.name for part in sys.argv[1:])
    ]
    survived = 0
    for mutant in chosen:
        started = time.monotonic()
        why = complaint(mutant)
        survived += why is not None
        verdict = "killed" if why is None else "SURVIVED"
        print(
            f"{verdict:9}{mutant.rule}  {mutant.path.name}  {time.monotonic() - started:.1f} s  {mutant.test}",
            flush=True,
        )
        if why is not None:
            print(why, flush=True)
    # The plain closing line: each mutant is a check of its own.
    print(f"{len(chosen) - survived} passed, {survived + len(uncovered)} failed")
    return 1 if survived or uncovered or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
