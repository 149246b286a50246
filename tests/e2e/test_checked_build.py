"""The compiled modules under AddressSanitizer, UBSan and Cython's own checks, as setup.py's two switches build it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SUITES = [
    ("_dedupe", "tests/contract/test_decision.py"),
    ("_dedupe", "tests/contract/test_index.py"),
    ("_dedupe", "tests/contract/test_index_bounded.py"),
    ("_dedupe", "tests/contract/test_index_load.py"),
    ("_dedupe", "tests/unit/test_dedupe_table.py"),
    ("_dedupe", "tests/unit/test_index_eviction.py"),
    ("_wire", "tests/contract/test_wire.py"),
    ("_wire", "tests/contract/test_wire_batch.py"),
    ("_wire", "tests/contract/test_wire_fuzz.py"),
    ("_group", "tests/contract/test_group.py"),
]
SECONDS = 400

# Faults that each kind of check must catch, in a module that the same build compiles. If one of them
# passes, so would a fault of ours.
PLANTED = """
from cpython.array cimport array
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

def heap_overflow(int size):
    cdef char *block = <char *>calloc(size, 1)
    block[size] = 1
    cdef int last = block[size]
    free(block)
    return last

def signed_shift(int bits):
    cdef int64_t one = 1
    return one << bits

def index_beyond(int[:] cells, int at):
    return cells[at]
"""
FAULTS = [
    ("heap_overflow(8)", "AddressSanitizer: heap-buffer-overflow"),
    ("signed_shift(64)", "runtime error: shift exponent 64 is too large"),
    ("index_beyond(array.array('i', [1]), 1)", "IndexError: Out of bounds on buffer access"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree whose extension modules are built with every check, the planted one among them."""
    copy = tmp_path_factory.mktemp("checked") / "paycore"
    for folder in ("src", "tests", "protos"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
        )
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    (copy / "src" / "paycore" / "_planted.pyx").write_text(PLANTED, encoding="utf-8")
    switches = {"PAYCORE_DEBUG_BUILD": "1", "PAYCORE_SANITIZE": "1"}
    built = run(copy, switches, "setup.py", "--quiet", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr[-4000:]
    return copy


def run(tree: Path, extra: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a tree, whose own package comes before the installed one."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = outer | {"PYTHONPATH": str(tree / "src")} | extra
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        timeout=SECONDS,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment in which an ordinary Python loads sanitized modules. CPython itself leaks on purpose."""
    libraries = [find_library(name) for name in ("libasan.so", "libubsan.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        # Python's own arenas would hide what lies beyond a block.
        "PYTHONMALLOC": "malloc",
        "PAYCORE_FUZZ_PERCENT": "5",
    }


def find_library(name: str) -> str:
    """Return where gcc keeps a library; gcc answers with the bare name where it has none."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    if path.strip() == name:
        pytest.skip(f"gcc has no {name}")
    return path.strip()


@pytest.mark.parametrize(("call", "said"), FAULTS, ids=[call.partition("(")[0] for call, _ in FAULTS])
def test_checked_build_fault_that_was_planted_is_caught(
    tree: Path, sanitized: dict[str, str], call: str, said: str
) -> None:
    ended = run(tree, sanitized, "-c", f"import array; from paycore._planted import *; {call}")
    assert ended.returncode != 0
    assert said in ended.stderr


@pytest.mark.parametrize(("module", "suite"), SUITES, ids=[suite.rpartition("/")[2] for _, suite in SUITES])
def test_checked_build_passes_the_suites_of_its_modules(
    tree: Path, sanitized: dict[str, str], module: str, suite: str
) -> None:
    where = run(tree, sanitized, "-c", f"import paycore.{module} as module; print(module.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(tree)
    # What is timed (serial) says nothing in a build that checks every access.
    ended = run(tree, sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not serial", suite)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert " passed" in ended.stdout
