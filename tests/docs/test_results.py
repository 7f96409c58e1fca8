"""Numbers in pages are those of results/*.csv, and each says where it comes from."""

import csv
from pathlib import Path

import pytest

from results import tables

FILES = sorted(path.name for path in tables.FOLDER.glob("*.csv"))
ROWS = [row for name in FILES for row in tables.load_rows(name)]


def test_no_page_differs_from_its_files() -> None:
    assert tables.find_stale_pages() == [], "run `python results/tables.py`"


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_shown(name: str) -> None:
    assert any(f"<!-- table: {name} |" in page.read_text() for page in tables.PAGES)


def test_rows_have_dates_and_commits() -> None:
    for row in ROWS:
        assert row["date"] == "not recorded" or len(row["date"].split("-")) == 3
        assert row["commit"] == "not recorded" or len(row["commit"]) >= 7


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    return tmp_path


def write_rows(path: Path, *rows: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


ORIGIN = {"command": "python train.py", "commit": "0123456", "machine": "not recorded", "date": "2026-11-29"}


def test_a_row_without_its_origin_is_refused(folder: Path) -> None:
    write_rows(folder / "x.csv", ORIGIN, ORIGIN | {"machine": ""})
    with pytest.raises(ValueError, match=r"results/x\.csv, line 3: no machine; write 'not recorded'"):
        tables.load_rows("x.csv")


def test_rows_that_agree_in_the_first_column_are_one_line(folder: Path) -> None:
    a = {"run": "a", "seed": "0", "acc": "0.5", "kept": "1"}
    write_rows(
        folder / "x.csv", a | ORIGIN, a | {"seed": "1", "acc": "0.6"} | ORIGIN, a | {"run": "b", "acc": ""} | ORIGIN
    )
    page = "<!-- table: x.csv | columns: run, accuracy={acc}, kept -->\n| old |\n<!-- table end -->\n"
    written = tables.update_page(page)
    assert "| run | accuracy | kept |\n| --- | --- | --- |\n| a | 0.5, 0.6 | 1 |\n| b |  | 1 |\n" in written
    assert "<small>machine not recorded; 2026-11-29; commands in `results/x.csv`</small>" in written
    assert tables.update_page(written) == written


def test_values_go_across_and_what_is_missing_stays_empty(folder: Path) -> None:
    rows = [
        {"name": n, "tokens": t, "x": x} | ORIGIN
        for n, t, x in [("a", "1024", "2"), ("a", "4096", "3"), ("b", "4096", "4")]
    ]
    write_rows(folder / "x.csv", *rows)
    table = tables.render_table("x.csv | columns: name | across: tokens | value: {x} | caption: none")
    assert table == "| name | 1,024 | 4,096 |\n| --- | --- | --- |\n| a | 2 | 3 |\n| b |  | 4 |\n"


def test_a_marker_that_finds_no_row_is_refused(folder: Path) -> None:
    write_rows(folder / "x.csv", {"run": "a"} | ORIGIN)
    with pytest.raises(ValueError, match="no row for 'run=b'"):
        tables.render_table("x.csv | rows: run=b | columns: run")
