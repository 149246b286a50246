"""Builds what cannot be written in pyproject.toml: the Cython modules and the protobuf code.

Two environment variables change how the Cython modules are compiled; both are for tests only:

- ``PAYCORE_DEBUG_BUILD=1``: bounds, wrap-around and None checks on, ``-O0 -g``, C asserts on.
- ``PAYCORE_SANITIZE=1``: AddressSanitizer and UBSan. Run Python with libasan preloaded
  (``LD_PRELOAD=$(gcc -print-file-name=libasan.so)``, ``ASAN_OPTIONS=detect_leaks=0``).

No ``-march=native``: a wheel must run on another machine than the one that built it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PROTOS = Path("protos")
PACKAGE = Path("src") / "paycore"

DEBUG_DIRECTIVES = {"boundscheck": True, "wraparound": True, "nonecheck": True, "initializedcheck": True}


def env_flag(name: str) -> bool:
    """Say whether a build switch is on. Anything but unset, empty, 0 or 1 is refused."""
    value = os.environ.get(name, "")
    if value not in {"", "0", "1"}:
        message = f"{name} must be 0 or 1, not {value!r}"
        raise SystemExit(message)
    return value == "1"


def compile_flags(*, debug: bool, sanitize: bool) -> tuple[list[str], list[str]]:
    """Return (compiler arguments, linker arguments) for gcc or clang."""
    compiler = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3"]
    linker: list[str] = []
    if sanitize:
        sanitizers = "-fsanitize=address,undefined"
        compiler += [sanitizers, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        linker += [sanitizers]
    return compiler, linker


def cython_extensions() -> list[Extension]:
    """Return one extension for every .pyx directly in the package."""
    compiler, linker = compile_flags(debug=env_flag("PAYCORE_DEBUG_BUILD"), sanitize=env_flag("PAYCORE_SANITIZE"))
    return [
        Extension(
            f"paycore.{source.stem}",
            [source.as_posix()],
            extra_compile_args=compiler,
            extra_link_args=linker,
        )
        for source in sorted(PACKAGE.glob("*.pyx"))
    ]


class BuildCython(build_ext):
    """Translates the .pyx files, with the checks switched on in a debug build, then compiles them."""

    def finalize_options(self) -> None:
        """Replace each .pyx by the C file made from it."""
        # Imported here: reading the metadata (egg_info, sdist) must not translate anything.
        from Cython.Build import cythonize

        debug = env_flag("PAYCORE_DEBUG_BUILD")
        # The switches are not among the inputs whose age is compared, so an object of another
        # mode would pass for fresh.
        self.force = True
        if self.distribution.ext_modules:
            self.distribution.ext_modules = cythonize(
                self.distribution.ext_modules,
                force=True,
                language_level=3,
                build_dir="build/cython-debug" if debug else "build/cython",
                compiler_directives=DEBUG_DIRECTIVES if debug else {},
            )
        super().finalize_options()


class GenerateProtos(Command):
    """Generates src/paycore/v1 from protos/: messages, services and typed stubs for both."""

    description = "generate the protobuf code and its stubs"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """Take no options."""

    def finalize_options(self) -> None:
        """Take no options."""

    def run(self) -> None:
        """Generate into a scratch directory, then replace what changed, so that no reader meets half a file."""
        with tempfile.TemporaryDirectory() as scratch:
            run_protoc(Path(scratch))
            target = ROOT / PACKAGE / "v1"
            made = {path.name: path for path in (Path(scratch) / "paycore" / "v1").iterdir()}
            for name, path in sorted(made.items()):
                replace_if_changed(path, target / name)
            for stale in target.glob("*_pb2*"):
                if stale.name not in made:
                    stale.unlink()


def run_protoc(output: Path) -> None:
    """Run protoc with the Python, gRPC and stub plugins over every proto, into `output`."""
    sources = sorted(path.relative_to(ROOT / PROTOS).as_posix() for path in (ROOT / PROTOS).rglob("*.proto"))
    plugins = [f"--plugin={name}={find_plugin(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={output}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{output}" for kind in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / PROTOS}", *plugins, *outputs, *sources]
    subprocess.run(command, check=True, cwd=ROOT)


def find_plugin(name: str) -> str:
    """Return the path of a protoc plugin: beside this interpreter, else on PATH (an isolated build)."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        message = f"{name} not found: install mypy-protobuf, or build with isolation (the default)"
        raise SystemExit(message)
    return found


def replace_if_changed(source: Path, target: Path) -> None:
    """Put `source` in the place of `target` in one step, unless it holds the same bytes already."""
    content = source.read_bytes()
    if target.exists() and target.read_bytes() == content:
        return
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(target)


class BuildWithProtos(build_py):
    """Generates the protobuf code before the modules of the package are collected."""

    def run(self) -> None:
        """Generate, then collect."""
        self.run_command("generate_protos")
        super().run()


setup(
    ext_modules=cython_extensions(),
    cmdclass={"build_ext": BuildCython, "build_py": BuildWithProtos, "generate_protos": GenerateProtos},
)
