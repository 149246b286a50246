"""What a figure was measured on: without it a figure says nothing."""

import os
import platform
import statistics
import subprocess
import sysconfig
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("paycore", "cython", "grpcio", "protobuf", "psycopg", "sqlalchemy", "uvloop")
_FSYNCS = 50


def describe() -> dict[str, str]:
    """Return the machine and the versions, by name; what cannot be found out reads ``unknown``."""
    facts = {
        "cpu": cpu_model(),
        "cpus usable": str(len(usable_cpus())),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": compiler_version(),
    }
    return facts | {package: package_version(package) for package in PACKAGES}


def usable_cpus() -> list[int]:
    """The processors that this process may run on; where the system does not tell, all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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
    words = str(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    return words[0]


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


def fsync_ms(folder: Path) -> float:
    """What it costs this folder's disk to make 4 KiB durable: the median of some appends."""
    taken = []
    path = folder / "fsync"
    with path.open("wb") as file:
        for _ in range(_FSYNCS):
            file.write(bytes(4_096))
            file.flush()
            started_ns = time.perf_counter_ns()
            os.fsync(file.fileno())
            taken.append((time.perf_counter_ns() - started_ns) / 1e6)
    path.unlink()
    return statistics.median(taken)
