"""The command: `python -m thresher.report DIR [DIR ...]`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from thresher.report.details import chosen_runs, page_details
from thresher.report.files import write_front, write_runs
from thresher.report.summary import summarise
from thresher.report.table import print_summary


def main(arguments: list[str] | None = None) -> int:
    """Read runs, write report.html, front.json and runs.csv, print the same as a table; return the exit code."""
    given = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    progress = Console(stderr=True)

    def tracked(sequence: Iterable[Any], title: str) -> Iterable[Any]:
        return track(sequence, title, console=progress, transient=True, disable=not progress.is_terminal)

    try:
        out = given.out or given.runs[0]
        summary = summarise(given.runs, _conf(given.conf), tracked)
        print_summary(summary, console)
        out.mkdir(parents=True, exist_ok=True)
        write_front(summary, out / "front.json")
        write_runs(summary, out / "runs.csv")
        from thresher.report.page import page

        chosen = list(tracked(chosen_runs(summary, given.details), "reading curves"))
        html = page(summary, [root.as_posix() for root in given.runs], page_details(summary, chosen))
        (out / "report.html").write_text(html, encoding="utf-8")
    except ImportError as error:
        print(f"error: the report needs {error.name}: pip install 'thresher[report]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"\n{out / 'report.html'}, front.json, runs.csv", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m thresher.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="a folder with runs in or below it")
    parser.add_argument("--out", type=Path, help="where the files go (default: the first DIR)")
    parser.add_argument(
        "--details",
        type=int,
        default=200,
        metavar="N",
        help="runs whose heads and curves the page holds (default: 200)",
    )
    parser.add_argument("--conf", type=Path, help="configs that the commands refer to (default: conf of this project)")
    return parser


def _conf(given: Path | None) -> Path | None:
    """Return the folder of configs; None, with a note, where there is none.

    Raises:
        FileNotFoundError: The folder asked for has none.
    """
    project = Path(__file__).parents[3] / "conf"
    for folder in [given] if given else [Path("conf"), project]:
        if (folder / "train.yaml").is_file():
            return folder
    if given:
        raise FileNotFoundError(f"{given} has no train.yaml: --conf is the folder that train.py reads its configs from")
    print("no conf/train.yaml here: the report says no commands; name the folder by --conf", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main())
