"""The scripts in examples/ and the Python of docs/api.md, run as a stranger would run them, against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.facts import AMOUNT_MINOR, CURRENCY, put_payments, select
from tests.support.server import ServerProcess, clean_environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BANKS = {
    "PAYCORE_SIMBANK_URL": "http://127.0.0.1:9",
    "PAYCORE_SIMBANK_SECRETS": '{"bank_a": "a", "bank_b": "b", "bank_c": "c"}',
}


def line(order_no: str, **changes: object) -> str:
    word = {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": order_no,
        "result": "CHANNEL_RESULT_SUCCESS",
        "amount_minor": AMOUNT_MINOR,
        "currency": CURRENCY,
        "channel_trade_no": f"T-{order_no}",
        **changes,
    }
    return json.dumps(word)


def run(server: ServerProcess, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "notify_many.py"), str(path), "--server", server.address]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)


def test_notify_many_hands_a_file_over_and_names_what_was_not_kept(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "paycore.db", env=BANKS)
    with server:
        numbers = put_payments(server.url, 300)
        path = tmp_path / "words.jsonl"
        path.write_text("".join(f"{line(number)}\n" for number in numbers), encoding="utf-8")
        first, again = run(server, path), run(server, path)
        path.write_text(f"{line(numbers[0])}\n{line(numbers[1], channel_trade_no='')}\n", encoding="utf-8")
        refused = run(server, path)
    assert (first.returncode, first.stderr, first.stdout.split()) == (0, "", ["300", "ACCEPTED"])
    assert (again.returncode, again.stdout.split()) == (0, ["300", "ACCEPTED", "(replayed)"])
    assert (refused.returncode, refused.stdout.split()) == (1, ["1", "ACCEPTED", "(replayed)"])
    assert refused.stderr.startswith("line 2: INVALID_NOTIFICATION: channel_trade_no")
    assert len(select(server.db_path, "SELECT * FROM payment_outcome")) == 300


def test_python_of_the_api_page_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = PYTHON_BLOCK.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    with ServerProcess(tmp_path / "paycore.db", env=BANKS) as server:
        for block in blocks:
            command = [sys.executable, "-W", "error", "-c", block.replace("127.0.0.1:50051", server.address)]
            ran = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
            assert (ran.returncode, ran.stderr) == (0, ""), block
