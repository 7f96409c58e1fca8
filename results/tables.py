"""Write the tables of README and docs/ from the CSV files beside this script: `python results/tables.py [--check]`.

A page marks a table by two comments. The first says which file, which rows and which columns:

    <!-- table: main_job.csv | rows: run=MCA or SMYRF | columns: run, seed, test accuracy={accuracy} -->
    <!-- table end -->

Rows that agree in the first column become one line. Its other cells list their values, one shared by all only once.
`| across: tokens | value: {x}` adds one column for each value of `tokens`; rows then agree in all of `columns`. A
caption says where and when rows were measured, unless there is `| caption: none`.
"""

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
PAGES = [FOLDER.parent / "README.md", *sorted(FOLDER.parent.glob("docs/**/*.md"))]
PROVENANCE = ("command", "commit", "machine", "date")
MARKED = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- table end -->)", flags=re.DOTALL)

Row = dict[str, str]


def load_rows(name: str) -> list[Row]:
    """Read a CSV file of this folder.

    Raises:
        ValueError: A row lacks a cell of `PROVENANCE`.
    """
    with (FOLDER / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):
        if empty := [column for column in PROVENANCE if not row.get(column)]:
            raise ValueError(
                f"results/{name}, line {number}: no {', '.join(empty)}; write 'not recorded' where it was not"
            )
    return rows


def render_table(request: str) -> str:
    """Return the Markdown table that a marker asks for."""
    name, *clauses = (part.strip() for part in request.split(" | "))
    asked = dict(clause.split(": ", 1) for clause in clauses)
    rows = _select(load_rows(name), asked.get("rows", ""))
    if not rows:
        raise ValueError(f"results/{name} has no row for {asked['rows']!r}")
    columns = [_name_and_template(column) for column in asked["columns"].split(", ")]
    if "across" in asked:
        head, lines = _pivot(rows, columns, asked["across"], asked["value"])
    else:
        head, lines = [title for title, _ in columns], _group(rows, [template for _, template in columns])
    table = [head, ["---"] * len(head), *lines]
    written = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    return written if asked.get("caption") == "none" else f"{written}\n{_describe_origin(name, rows)}\n"


def update_page(text: str) -> str:
    """Return a page with every marked table written anew."""
    return MARKED.sub(lambda found: f"{found[1]}{render_table(' '.join(found[2].split()))}{found[4]}", text)


def find_stale_pages() -> list[Path]:
    """List the pages whose tables differ from the CSV files."""
    return [page for page in PAGES if update_page(page.read_text()) != page.read_text()]


def _select(rows: list[Row], conditions: str) -> list[Row]:
    """Keep the rows for which each `column=a or b` of `conditions`, separated by semicolons, holds."""
    for condition in filter(None, conditions.split("; ")):
        column, _, values = condition.partition("=")
        rows = [row for row in rows if row[column] in values.split(" or ")]
    return rows


def _name_and_template(column: str) -> tuple[str, str]:
    title, equals, template = column.partition("=")
    return title.replace("_", " "), template if equals else f"{{{column}}}"


def _group(rows: list[Row], templates: list[str]) -> list[list[str]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(templates[0].format_map(row), []).append(row)
    return [
        [first, *(_join(t.format_map(row) for row in group) for t in templates[1:])] for first, group in groups.items()
    ]


def _pivot(
    rows: list[Row], columns: list[tuple[str, str]], across: str, value: str
) -> tuple[list[str], list[list[str]]]:
    heads = list(dict.fromkeys(row[across] for row in rows))
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        key = tuple(template.format_map(row) for _, template in columns)
        lines.setdefault(key, {}).setdefault(row[across], []).append(value.format_map(row))
    body = [[*key, *(_join(cells.get(head, [])) for head in heads)] for key, cells in lines.items()]
    return [*(title for title, _ in columns), *(f"{int(h):,}" if h.isdigit() else h for h in heads)], body


def _describe_origin(name: str, rows: list[Row]) -> str:
    machines, dates = (list(dict.fromkeys(row[column] for row in rows)) for column in ("machine", "date"))
    span = " to ".join(dict.fromkeys((min(dates), max(dates))))
    places = "; ".join("machine not recorded" if machine == "not recorded" else machine for machine in machines)
    return f"<small>{places}; {span}; commands in `results/{name}`</small>"


def _join(values: Iterable[str]) -> str:
    """List the values, a dash for each that is missing, or show the one that all share."""
    given = list(values)
    return next(iter(given), "") if len(set(given)) <= 1 else ", ".join(value or "–" for value in given)


def main() -> int:
    """Write the pages, or say which ones are stale; return the exit code."""
    stale = find_stale_pages()
    for page in stale:
        print(f"{page.relative_to(FOLDER.parent)}: tables differ from results/*.csv; run `python results/tables.py`")
        if "--check" not in sys.argv:
            page.write_text(update_page(page.read_text()))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
