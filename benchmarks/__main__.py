"""Run one benchmark by name, or all that there are: ``python -m benchmarks [name] [its options]``."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks
from benchmarks import report

SUFFIX = "_bench"
REPORT = "report"


def names() -> list[str]:
    """The benchmarks that there are."""
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removesuffix(SUFFIX) for name in modules if name.endswith(SUFFIX))


def run(name: str, arguments: list[str]) -> int:
    """Run one benchmark with its options and return its exit code."""
    exit_code: int = importlib.import_module(f"benchmarks.{name}{SUFFIX}").main(arguments)
    return exit_code


def main(arguments: list[str]) -> int:
    """Run what is named, or everything; options without a name go to every benchmark."""
    if arguments and arguments[0] == REPORT:
        return report.main(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in names():
            print(f"no benchmark {arguments[0]!r}; there are: {', '.join(names())}, and {REPORT}", file=sys.stderr)
            return 2
        return run(arguments[0], arguments[1:])
    return max(run(name, arguments) for name in names())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
