"""Run one benchmark by name, or all that there are: ``python -m benchmarks [name] [its options]``.

All of them is a quick run: some seconds each, to see that they work here and about how fast it is. For figures worth
keeping there is the report.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import benchmarks
from benchmarks import report
from benchmarks.cells import BENCH, STORES

SUFFIX = "_bench"
REPORT = "report"

QUICK = {
    "audit": ("--count", "50000"),
    "index": ("--count", "100000", "--checks", "100000"),
    "notify": ("--count", "2000", "--runs", "1"),
    "peers": ("--count", "50000"),
    "refund": ("--count", "300"),
    "sweep": ("--count", "50000"),
}
"""The options of a quick run of each benchmark that there is here."""

QUICK_VERBS = (
    *(("notify", "--store", store, "--count", "100000", "--mix", "dirty", "--idle") for store in STORES),
    *(("startup", "--store", store, "--count", "50000") for store in STORES),
    ("wire", "--count", "50000"),
)
"""What of ``paycore bench`` is in a quick run: the index is among the benchmarks above."""


def names() -> list[str]:
    """The benchmarks that there are."""
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removesuffix(SUFFIX) for name in modules if name.endswith(SUFFIX))


def run(name: str, arguments: list[str]) -> int:
    """Run one benchmark with its options and return its exit code."""
    exit_code: int = importlib.import_module(f"benchmarks.{name}{SUFFIX}").main(arguments)
    return exit_code


def run_all(arguments: list[str]) -> Iterator[int]:
    """Run everything quickly, what is given beside the quick run's own options; yield each exit code."""
    for verb in QUICK_VERBS:
        headline(f"paycore bench {verb[0]}")
        yield subprocess.run([sys.executable, *BENCH, *verb, *arguments], check=False).returncode
    for name in names():
        headline(f"python -m benchmarks {name}")
        yield run(name, [*QUICK[name], *arguments])


def headline(text: str) -> None:
    """Say what comes, on standard error: the figures alone are the output."""
    print(f"\n=== {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run what is named, or everything; options without a name go to every benchmark."""
    if arguments and arguments[0] == REPORT:
        return report.main(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in names():
            print(f"no benchmark {arguments[0]!r}; there are: {', '.join(names())}, and {REPORT}", file=sys.stderr)
            return 2
        return run(arguments[0], arguments[1:])
    return max(run_all(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
