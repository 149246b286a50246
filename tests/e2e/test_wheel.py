"""What a user gets: a wheel, built from the sdist in an empty environment, works far from the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from paycore.bench import postgresql_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What a tree may hold that is not source: none of it may be what makes a build work.
NOT_SOURCE = (
    ".git",
    ".venv",
    "node_modules",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "*.so",
    "*_pb2*",
    ".*_cache",
)
BUILD_SECONDS = 300
DEMO_SECONDS = 90
BENCH_SECONDS = 120


class Installed(NamedTuple):
    """A virtual environment that holds the wheel and what it asks for, nothing else."""

    python: Path
    paycore: Path
    elsewhere: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a stranger: an empty HOME, and nothing that points to this tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PAYCORE_", "PYTHON", "PYTEST"))}
    kept.pop("VIRTUAL_ENV", None)
    kept["HOME"] = str(tmp_path_factory.mktemp("home"))
    kept["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return kept


def run(arguments: list[str | Path], cwd: Path, environment: Mapping[str, str], seconds: int) -> str:
    """Run a program to its end and return its standard output; fail with all it said."""
    ended = subprocess.run(
        arguments, cwd=cwd, env=environment, timeout=seconds, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if ended.returncode != 0:
        pytest.fail(f"{arguments} ended with {ended.returncode}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}")
    return ended.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a fresh clone has them."""
    copy = tmp_path_factory.mktemp("tree") / "paycore"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def archives(tree: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: Mapping[str, str]) -> Path:
    """A folder with the sdist, and the wheel that was built from it in an environment of its own."""
    output = tmp_path_factory.mktemp("dist")
    # Without --sdist or --wheel, build makes the wheel from the unpacked sdist.
    run([sys.executable, "-m", "build", "--outdir", output], tree, clean_environment, BUILD_SECONDS)
    return output


@pytest.fixture(scope="module")
def wheel_names(archives: Path) -> set[str]:
    """The names of the files in the wheel."""
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(
    archives: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: Mapping[str, str]
) -> Installed:
    """The wheel in a new virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run([sys.executable, "-m", "venv", folder], elsewhere, clean_environment, BUILD_SECONDS)
    (wheel,) = archives.glob("*.whl")
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", wheel], elsewhere, clean_environment, BUILD_SECONDS)
    return Installed(python, folder / "bin" / "paycore", elsewhere, dict(clean_environment))


def source_names(tree: Path, pattern: str) -> set[str]:
    """Return the files of the package that match, as the wheel names them."""
    found = (tree / "src" / "paycore").rglob(pattern)
    return {path.relative_to(tree / "src").as_posix() for path in found if path.is_file() and "_pb2" not in path.name}


@pytest.mark.parametrize("pattern", ["*.py", "*.pyi", "*.pxd", "py.typed", "migrations/**/*", "templates/**/*"])
def test_wheel_holds_every_source_file_that_matches(tree: Path, wheel_names: set[str], pattern: str) -> None:
    expected = source_names(tree, pattern)
    assert expected, f"the source tree has no {pattern}: this test shows nothing"
    assert expected <= wheel_names


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"])
def test_wheel_holds_generated_code_for_every_proto(tree: Path, wheel_names: set[str], suffix: str) -> None:
    protos = [path.relative_to(tree / "protos").with_suffix("") for path in (tree / "protos").rglob("*.proto")]
    assert {f"{proto.as_posix()}{suffix}" for proto in protos} <= wheel_names


def test_wheel_holds_a_compiled_module_for_every_pyx(tree: Path, wheel_names: set[str]) -> None:
    sources = {path.stem for path in (tree / "src" / "paycore").glob("*.pyx")}
    compiled = {Path(name).name.partition(".")[0] for name in wheel_names if name.endswith((".so", ".pyd"))}
    assert sources
    assert compiled == sources


PROBE = "paycore/bench/index_probe.c"
"""The one C source of ours that is not made by Cython: the benchmark of the index compiles it."""


def test_wheel_holds_nothing_but_the_package_and_its_metadata(wheel_names: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel_names} == {"paycore", "paycore-0.1.0.dist-info"}
    assert not [name for name in wheel_names if name.endswith(".pyc") or "__pycache__" in name]
    assert {name for name in wheel_names if name.endswith(".c")} == {PROBE}


def test_sdist_holds_sources_and_nothing_generated(tree: Path, archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    protos = {path.relative_to(tree).as_posix() for path in (tree / "protos").rglob("*.proto")}
    cython = {path.relative_to(tree).as_posix() for path in (tree / "src").rglob("*.p[yx][xd]")}
    assert {"src/paycore/_dedupe.pyx", "src/paycore/_wire.pyx", "src/paycore/_protobuf.pxd"} <= cython
    assert protos | cython | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if "_pb2" in name or name.endswith((".so", ".pyc"))]
    assert {name for name in names if name.startswith("src/") and name.endswith(".c")} == {f"src/{PROBE}"}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_paycore_command_far_from_the_source_tree_answers(installed: Installed, arguments: list[str]) -> None:
    said = run([installed.paycore, *arguments], installed.elsewhere, installed.environment, 60)
    assert ("0.1.0" if arguments == ["--version"] else "demo") in said


@pytest.mark.parametrize(
    "module", ["paycore._dedupe", "paycore._wire", "paycore.v1.payment_pb2", "paycore.v1.payment_service_pb2_grpc"]
)
def test_installed_module_is_imported_from_the_environment(installed: Installed, module: str) -> None:
    program = f"import {module} as module; print(module.__file__)"
    said = run([installed.python, "-W", "error", "-c", program], installed.elsewhere, installed.environment, 60)
    assert Path(said.strip()).is_relative_to(installed.python.parent.parent)


def test_installed_distributions_satisfy_one_another(installed: Installed) -> None:
    run([installed.python, "-m", "pip", "check"], installed.elsewhere, installed.environment, 60)


BENCHES = [
    ("notify", "--count", "2000", "--mix", "dirty"),
    ("startup", "--count", "500", "--rounds", "1"),
    ("index", "--count", "1000", "--checks", "1000", "--rounds", "5"),
    ("wire", "--count", "2000"),
]


@pytest.mark.parametrize("arguments", BENCHES, ids=" ".join)
def test_bench_from_the_wheel_gives_a_figure(installed: Installed, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    folder = () if arguments[0] == "wire" else ("--folder", str(tmp_path))
    bench(installed, *arguments, *folder)
    assert list(tmp_path.iterdir()) == []


def test_bench_from_the_wheel_on_postgresql_gives_a_figure(installed: Installed) -> None:
    """On a server that runs already: the wheel brings none, and asks for none."""
    with tempfile.TemporaryDirectory(prefix="paycore-wheel-bench-") as folder:
        # PostgreSQL does not run as root, and others than root may not pass pytest's own folders.
        Path(folder).chmod(0o755)
        with postgresql_server.running(Path(folder)) as url:
            told = bench(installed, "notify", "--count", "500", "--batch", "100", "--db", url, "--folder", folder)
    assert "PostgreSQL" in told["machine"]["database"]


def bench(installed: Installed, verb: str, *arguments: str) -> dict[str, Any]:
    command: list[str | Path] = [installed.paycore, "bench", verb, *arguments, "--json"]
    told: dict[str, Any] = json.loads(run(command, installed.elsewhere, installed.environment, BENCH_SECONDS))
    assert told["benchmark"] == verb
    assert told["rate"] > 0
    assert told["limit_rate"] > 0
    assert told["machine"]["paycore"] == "0.1.0"
    return told


def test_demo_from_the_wheel_in_an_empty_folder_ends_well(installed: Installed, tmp_path: Path) -> None:
    said = run([installed.paycore, "demo", "--json"], tmp_path, installed.environment, DEMO_SECONDS)
    report = json.loads(said)
    assert report["stories"]
    assert [story for story in report["stories"] if not story["ok"]] == []
    assert report["ok"] is True
