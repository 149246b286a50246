"""What a figure was measured on: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

from rich.console import Console

PACKAGES = ("paycore", "cython", "grpcio", "protobuf", "sqlalchemy", "uvloop")


def describe() -> dict[str, str]:
    """Return the machine and the versions, by name; what cannot be found out reads ``unknown``."""
    facts = {
        "cpu": cpu_model(),
        "cpus usable": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": compiler_version(),
    }
    return facts | {package: package_version(package) for package in PACKAGES}


def show(console: Console) -> None:
    """Print the machine and the versions, one a line."""
    for name, value in describe().items():
        console.print(f"[dim]{name:>12}[/dim]  {value}", highlight=False)


def cpu_model() -> str:
    """The processor as the kernel names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def compiler() -> str:
    """The C compiler's command, as Python was built with, or CC where that is set."""
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]


def compiler_version() -> str:
    """The first line that the C compiler says about itself."""
    try:
        answer = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.splitlines()[0]


def package_version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
