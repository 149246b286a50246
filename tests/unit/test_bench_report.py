"""The report of the benchmarks: the page is filled of figures alone, a run is resumed, and the chart can be read."""

from __future__ import annotations

import itertools
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chart
from benchmarks.cells import BATCHES, Cell, CellError, Results, cells
from benchmarks.report import PAGE, Page, fill, main, table

ROW = {"name": "a row", "meaning": "what it is", "rate": 1_000.0, "p50_ms": 1.0, "p99_ms": 2.0, "of_limit": 0.5}
UNARY_ROW = ROW | {"slowest_rate": 900.0, "fastest_rate": 1_100.0, "ratio": 0.7}
TOLD: dict[str, Any] = {
    "rate": 1_000.0,
    "baseline_rate": 500.0,
    "limit_rate": 2_000.0,
    "p50_ms": 1.0,
    "p99_ms": 2.0,
    "count": 10,
    "batch": 1_000,
    "in_flight": 8,
    "group": 100.0,
    "dirty_rate": 900.0,
    "existing": 0,
    "meaning": "what it is",
    "open_loop_rate": 500.0,
    "open_loop_p50_ms": 1.0,
    "open_loop_p99_ms": 3.0,
    "idle_p50_ms": 0.5,
    "idle_p99_ms": 0.9,
    "machine": {"cpu": "a processor", "database": "one", "fsync": "fast"},
}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Figures for every cell, as a run leaves them."""
    folder = tmp_path / "kept"
    folder.mkdir()
    for place, cell in enumerate(cells(1), start=1):
        row = UNARY_ROW if cell.name.startswith("unary") else ROW
        told = TOLD | {"rate": 1_000.0 * place, "results": [row]}
        (folder / f"{cell.name}.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def test_report_fills_every_section_of_the_page_and_draws_the_chart(kept: Path, tmp_path: Path) -> None:
    page, drawn = tmp_path / "page.md", tmp_path / "chart.svg"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    given = ["--kept", str(kept), "--page", str(page), "--chart", str(drawn)]
    assert main(given) == 0
    filled = page.read_text(encoding="utf-8")
    for text in Page(Results(kept)).sections().values():
        assert text in filled
    assert "| SQLite | 1,000 | **4,000** |" in filled
    assert main(given) == 0
    assert page.read_text(encoding="utf-8") == filled, "filling a filled page changes nothing"
    ET.parse(drawn)


def test_report_without_a_figure_writes_nothing(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kept / "batch-10-sqlite.json").unlink()
    with pytest.raises(CellError, match="batch-10-sqlite was not measured"):
        Page(Results(kept)).sections()


def test_cell_that_was_measured_is_not_run_again(tmp_path: Path) -> None:
    program = (
        "import json, pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('+'); print(json.dumps({'rate': 1}))"
    )
    ran = tmp_path / "ran"
    first, second = (Cell(name, ("-c", program, str(ran)), 1, takes_folder=False) for name in ("first", "second"))
    results = Results(tmp_path / "kept")
    results.measure([first], None)
    results.measure([first, second], None)
    assert ran.read_text() == "++"
    results.forget()
    results.measure([first], None)
    assert ran.read_text() == "+++"


def test_cell_that_fails_says_what_and_leaves_nothing(tmp_path: Path) -> None:
    cell = Cell("broken", ("-c", "import sys; sys.exit('no figures: counts')"), 1, takes_folder=False)
    results = Results(tmp_path)
    with pytest.raises(CellError, match="no figures: counts"):
        results.measure([cell], None)
    assert results.get("broken") is None
    assert sys.executable


def test_page_without_a_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places for peers"):
        fill("nothing here", {"peers": "text"})


def test_table_puts_figures_to_the_right() -> None:
    assert table(["what", "a second"], [("ORM", "1,000"), ("bare", "**2,000**")]).splitlines() == [
        "| what | a second |",
        "| --- | ---: |",
        "| ORM | 1,000 |",
        "| bare | **2,000** |",
    ]


def test_chart_names_lines_units_and_ticks_in_both_modes() -> None:
    line = chart.Line("SQLite p50", "a", "", [(batch, 10.0 * batch) for batch in BATCHES])
    drawn = chart.render([chart.Panel("Latency", "ms", [line])], "notifications a message", "title", "note")
    texts = {"".join(element.itertext()) for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {"title", "note", "Latency, ms", "SQLite p50", "notifications a message", "1", "10,000", "100k"}
    assert "prefers-color-scheme: dark" in drawn


def test_labels_of_lines_that_end_together_do_not_meet() -> None:
    lines = [chart.Line(name, "a", "", [(1, 10.0), (10, 20.0)]) for name in ("one", "two", "three")]
    drawn = chart.render([chart.Panel("", "", lines)], "", "", "")
    labels = [element for element in ET.fromstring(drawn).iter() if element.text in {"one", "two", "three"}]
    heights = sorted(float(element.attrib["y"]) for element in labels)
    assert all(below - above >= 15 for above, below in itertools.pairwise(heights))
