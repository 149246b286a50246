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
from benchmarks.cells import BATCHES, Cell, CellError, Results, cells, chosen, shown
from benchmarks.report import PAGE, Page, fill, main, table, write

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
    "open_loop_client_late_p50_ms": 0.1,
    "open_loop_client_late_p99_ms": 0.2,
    "idle_p50_ms": 0.5,
    "idle_p99_ms": 0.9,
    "alone_rate": 600.0,
    "alone_p50_ms": 1.5,
    "alone_p99_ms": 1.9,
    "rates": {"1": {"refunder": 100.0, "bare": 200.0}, "4": {"refunder": 150.0, "bare": 300.0}},
    "full_seconds": 20.0,
    "idle_seconds": 0.004,
    "burst_seconds": 0.05,
    "scan_seconds": 10.0,
    "audit": {"count": 20, "rate": 50.0, "audit_seconds": 40.0, "cpu_seconds": 30.0, "scan_seconds": 20.0},
    "machine": {"cpu": "a processor", "database": "one", "fsync": "fast"},
}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Figures for every cell, the long ones too, as a run leaves them."""
    folder = tmp_path / "kept"
    folder.mkdir()
    for place, cell in enumerate(cells(1), start=1):
        row = UNARY_ROW if cell.name.startswith("unary") else ROW
        told = TOLD | {"rate": 1_000.0 * place, "results": [row], "command": shown(cell.arguments)}
        (folder / f"{cell.name}.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def test_report_fills_every_section_of_the_page_and_draws_the_chart(kept: Path, tmp_path: Path) -> None:
    page, drawn = tmp_path / "page.md", tmp_path / "chart.svg"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    given = ["--long", "--kept", str(kept), "--page", str(page), "--chart", str(drawn)]
    assert main(given) == 0
    filled = page.read_text(encoding="utf-8")
    for text in Page(Results(kept)).sections().values():
        assert text in filled
    assert "| SQLite | 1,000 | **4,000** |" in filled
    assert main(given) == 0
    assert page.read_text(encoding="utf-8") == filled, "filling a filled page changes nothing"
    ET.parse(drawn)


@pytest.mark.parametrize(
    "line",
    [
        "| SQLite | a message of 1,000, one after another | 600/s: p50 1.50 ms, p99 1.90 ms |",
        "| PostgreSQL | 4 | **150** | 300 | 0.50 | 10 |",
        "| SQLite | 10 | 4 | 50 | **20.0** |",
        "| PostgreSQL | 20 | **40.0** | 50 | 30.0 | 20.0 | 2.00 |",
    ],
)
def test_report_tells_figures_beside_their_baseline(kept: Path, line: str) -> None:
    assert line in "\n".join(Page(Results(kept)).sections().values())


def test_report_tells_of_the_load_being_late_itself(kept: Path) -> None:
    told = Page(Results(kept)).sections()["beyond"]
    assert "500/s: p50 1.00 ms, p99 3.00 ms; of it client late p50 0.10 ms, p99 0.20 ms" in told


def test_report_of_long_cells_has_a_row_for_each_size(kept: Path) -> None:
    sections = Page(Results(kept)).sections()
    assert sections["index"].count("payments | checks a second") == 3
    assert sections["sweeps"].count("| SQLite |") == sections["audits"].count("| PostgreSQL |") == 2
    for cell in chosen(cells(1), None, long=True):
        if cell.long:
            (kept / f"{cell.name}.json").unlink()
    without = Page(Results(kept)).sections()
    assert without.keys() == sections.keys(), "what takes minutes is no condition of a report"
    assert without["index"].count("payments | checks a second") == without["sweeps"].count("| SQLite |") == 1


def test_section_without_its_figures_stays_as_it_was(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, drawn = tmp_path / "page.md", tmp_path / "chart.svg"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    (kept / "batch-10-sqlite.json").unlink()
    left = Page(Results(kept))
    assert "batch" not in left.sections()
    write(left, page, drawn)
    assert "batch stays as it was: batch-10-sqlite was not measured" in capsys.readouterr().err
    assert not drawn.exists()
    before, after = (path.read_text(encoding="utf-8") for path in (PAGE, page))
    assert section(before, "batch") == section(after, "batch")
    assert section(before, "refunds") != section(after, "refunds")


def section(page: str, name: str) -> str:
    return page.partition(f"<!-- measured: {name} -->")[2].partition("<!-- end -->")[0]


def test_only_the_cells_that_are_named_are_chosen() -> None:
    every = cells(1)
    assert [cell.name for cell in chosen(every, ["wire", "repair-many-*"], long=False)] == [
        *("wire", "repair-many-sqlite", "repair-many-postgresql")
    ]
    assert not any(cell.long for cell in chosen(every, None, long=False))
    assert chosen(every, None, long=True) == every
    assert len({cell.name for cell in every}) == len(every)
    with pytest.raises(CellError, match="no cell 'batch-1000'"):
        chosen(every, ["wire", "batch-1000"], long=True)


def test_cells_are_as_large_as_the_figures_that_are_asked_for() -> None:
    """A million words for each store, ten million payments before, 50 million in the index."""
    commands = {cell.name: shown(cell.arguments) for cell in cells(1)}
    for store in ("sqlite", "postgresql"):
        headline = f"paycore bench notify --store {store} --batch 1000 --count 1000000"
        assert commands[f"batch-1000-{store}"] == f"{headline} --mix dirty --open-loop half --idle"
        assert commands[f"existing-few-{store}"] == f"{headline} --existing 100000"
        assert commands[f"existing-many-{store}"] == f"{headline} --existing 10000000"
        assert commands[f"startup-{store}"] == f"paycore bench startup --store {store} --count 1000000"
        assert "--processes 1,4" in commands[f"refund-{store}"]
        for name, count in (("repair", 1_000_000), ("repair-many", 10_000_000)):
            assert commands[f"{name}-{store}"].startswith("python -m benchmarks sweep --audit ")
            assert commands[f"{name}-{store}"].endswith(f"--count {count}")
    assert commands["index-many"] == "paycore bench index --count 10000000"
    assert commands["index-most"] == "paycore bench index --count 50000000 --alone"


def test_cells_of_a_trial_have_smaller_counts_and_take_less_time() -> None:
    for trial, cell in zip(cells(0.01), cells(1), strict=True):
        assert trial.name == cell.name
        assert 5 <= trial.seconds < cell.seconds
        assert len(trial.arguments) == len(cell.arguments)
    (trial,) = chosen(cells(0.01), ["existing-many-sqlite"], long=False)
    assert shown(trial.arguments).endswith("--batch 1000 --count 10000 --existing 100000")


def test_list_of_the_cells_tells_how_long_each_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "wire"]) == 0
    assert "wire: paycore bench wire --count 500000" in capsys.readouterr().out


def test_report_on_a_cell_that_is_not_there_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"]) == 1
    assert "no report: no cell 'nothing'" in capsys.readouterr().err


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
    results.measure([first._replace(arguments=(*first.arguments, "more"))], None)
    assert ran.read_text() == "++++", "a run with other counts is another run"


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
