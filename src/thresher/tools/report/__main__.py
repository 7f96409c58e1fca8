"""Compare runs: `python -m thresher.report [key=value ...]`."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track

from thresher.config.commands import asks_for_help, compose_options, find_conf, read_help
from thresher.console import accept_any_text, end_command
from thresher.tools.report.details import choose_runs, read_details
from thresher.tools.report.files import write_front, write_runs
from thresher.tools.report.summary import summarise
from thresher.tools.report.table import print_summary


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    accept_any_text()
    try:
        if asks_for_help(arguments):
            print(read_help("report"))
        else:
            report(compose_options(find_conf("report"), "report", arguments, input_key="runs"))
    except BrokenPipeError:
        raise
    except ImportError as error:
        print(f"error: the report needs {error.name}: pip install 'thresher[report]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(cfg: DictConfig) -> None:
    """Read runs, print them as a table, and write report.html, front.json and runs.csv.

    Raises:
        FileNotFoundError: A folder does not exist, or `conf` holds no configs.
        ValueError: `details` is negative.
    """
    roots = [Path(str(root)) for root in (cfg.runs if OmegaConf.is_list(cfg.runs) else [cfg.runs])]
    folder = roots[0] if cfg.run.dir is None else Path(cfg.run.dir)
    if cfg.details < 0:
        raise ValueError(f"details={cfg.details} must be at least 0")
    console = Console(width=None if sys.stdout.isatty() else 140)
    progress = Console(stderr=True)

    def show_progress(sequence: Iterable[Any], title: str) -> Iterable[Any]:
        return track(sequence, title, console=progress, transient=True, disable=not progress.is_terminal)

    summary = summarise(roots, find_train_configs(cfg.conf), show_progress)
    print_summary(summary, console)
    folder.mkdir(parents=True, exist_ok=True)
    write_front(summary, folder / "front.json")
    write_runs(summary, folder / "runs.csv")
    from thresher.tools.report.page import render_page

    details = {
        str(place): read_details(summary.runs[place])
        for place in show_progress(choose_runs(summary, cfg.details), "reading curves")
    }
    html = render_page(summary, [root.as_posix() for root in roots], details)
    (folder / "report.html").write_text(html, encoding="utf-8")
    console.print(f"\n{folder / 'report.html'}, front.json, runs.csv", highlight=False, soft_wrap=True)


def find_train_configs(conf: str | None) -> Path | None:
    """Find the configs that commands refer to; return None, with a note, where there are none.

    Raises:
        FileNotFoundError: The folder that was named holds none.
    """
    if conf is not None:
        if not (Path(conf) / "train.yaml").is_file():
            raise FileNotFoundError(f"{conf} has no train.yaml: conf names the folder of train.py's configs")
        return Path(conf)
    try:
        return find_conf("train")
    except FileNotFoundError:
        print("there is no conf/train.yaml here, so no commands are shown; name the folder by conf=", file=sys.stderr)
        return None


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
