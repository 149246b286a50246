"""The policy of tests/conftest.py, run in a pytest of its own: in CI a skip fails, elsewhere it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

POLICY = Path(__file__).parents[1] / "conftest.py"

# Every way to skip: name of the module, its body.
SKIPS = {
    "by_mark": "@pytest.mark.skip(reason='no such tool')\ndef test_it(): pass",
    "by_condition": "@pytest.mark.skipif(True, reason='no such tool')\ndef test_it(): pass",
    "by_call": "def test_it(): pytest.skip('no such tool')",
    "by_fixture": "@pytest.fixture\ndef tool(): pytest.skip('no such tool')\ndef test_it(tool): pass",
    "by_module": "pytest.skip('no such tool', allow_module_level=True)",
    "by_import": "pytest.importorskip('no_such_module', reason='no such tool')",
}
PASSES = "def test_it(): pass"
FAILS_AS_EXPECTED = "@pytest.mark.xfail(reason='known')\ndef test_it(): assert False"


def run(pytester: pytest.Pytester, bodies: dict[str, str], *arguments: str) -> pytest.RunResult:
    """Run these modules under the policy and nothing else of ours."""
    pytester.makeconftest(POLICY.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(**{f"test_{name}": f"import pytest\n{body}" for name, body in bodies.items()})
    return pytester.runpytest_inprocess("--continue-on-collection-errors", "-rA", *arguments)


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_skip_in_ci_fails_and_says_why(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(pytester, SKIPS | {"passing": PASSES}, *arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == 1
    assert outcomes["failed"] + outcomes["errors"] == len(SKIPS)
    assert "skipped" not in outcomes
    for name in SKIPS:
        result.stdout.fnmatch_lines_random([f"test_{name}.py*: a skip is a failure in CI (*no such tool)"])


def test_skip_outside_ci_is_allowed(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    result = run(pytester, SKIPS | {"passing": PASSES})
    result.assert_outcomes(passed=1, skipped=len(SKIPS))
    assert result.ret == pytest.ExitCode.OK


def test_expected_failure_in_ci_is_no_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(pytester, {"expected": FAILS_AS_EXPECTED})
    result.assert_outcomes(xfailed=1)
    assert result.ret == pytest.ExitCode.OK
