"""The ranges in pyproject.toml fit the generated code, one another and their record in docs/decisions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import paycore.v1

ROOT = Path(__file__).parents[2]
GENERATED = Path(paycore.v1.__file__).parent


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(*groups: str) -> dict[str, Requirement]:
    """Return the requirements of these groups by name: "run", "build", "dev" or "bench"."""
    project = pyproject()
    listed = {
        "run": project["project"]["dependencies"],
        "build": project["build-system"]["requires"],
        "dev": project["project"]["optional-dependencies"]["dev"],
        "bench": project["project"]["optional-dependencies"]["bench"],
    }
    parsed = [Requirement(line) for group in groups for line in listed[group]]
    return {requirement.name: requirement for requirement in parsed}


def floor(requirement: Requirement) -> Version:
    return max(Version(one.version) for one in requirement.specifier if one.operator == ">=")


def stated(pattern: str, files: str) -> set[Version]:
    """Return the versions that the generated files demand."""
    found = {match.group(1) for path in GENERATED.glob(files) if (match := re.search(pattern, path.read_text("utf-8")))}
    assert found, f"no version in {files}: was the code generated?"
    return {Version(version) for version in found}


def test_generated_messages_accept_the_oldest_protobuf_that_is_allowed() -> None:
    assert max(stated(r"# Protobuf Python Version: (\S+)", "*_pb2.py")) <= floor(requirements("run")["protobuf"])


@pytest.mark.parametrize("name", ["grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status"])
def test_generated_services_accept_the_oldest_grpcio_that_is_allowed(name: str) -> None:
    assert max(stated(r"GRPC_GENERATED_VERSION = '([^']+)'", "*_pb2_grpc.py")) <= floor(requirements("run")[name])


def test_dev_extra_holds_the_build_requirements_in_the_same_ranges() -> None:
    build, dev = requirements("build"), requirements("dev")
    assert {name: dev[name].specifier for name in build} == {name: one.specifier for name, one in build.items()}


@pytest.mark.parametrize("group", ["run", "build", "dev", "bench"])
def test_requirement_has_a_floor_and_a_ceiling(group: str) -> None:
    open_ended = [
        str(one) for one in requirements(group).values() if {part.operator for part in one.specifier} != {">=", "<"}
    ]
    assert open_ended == []


def test_decision_record_names_each_requirement_with_its_range() -> None:
    record = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| `([^`]+)` \|", record, re.MULTILINE)
    recorded = {name: Requirement(f"{name}{ranges}").specifier for name, ranges in rows}
    assert recorded == {name: one.specifier for name, one in requirements("run", "build", "dev", "bench").items()}
