"""What a figure was measured on, printed for people; what it is, ``paycore.bench.machine`` finds out."""

from __future__ import annotations

from rich.console import Console

from paycore.bench.machine import compiler, compiler_version, describe, fsync_ms

__all__ = ["compiler", "compiler_version", "describe", "fsync_ms", "show"]


def show(console: Console) -> None:
    """Print the machine and the versions, one a line."""
    for name, value in describe().items():
        console.print(f"[dim]{name:>12}[/dim]  {value}", highlight=False)
