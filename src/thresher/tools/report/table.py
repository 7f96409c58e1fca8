"""The report in the terminal: fronts, dense twins, and what has no results."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.tools.report.settings import Setting, Spread, lower_is_better, name_axis
from thresher.tools.report.summary import Summary, describe_setting, describe_training_differences

ROWS = 20  # of settings off the front, by task
LISTED = 10  # failed, stopped or running runs


def print_summary(summary: Summary, console: Console) -> None:
    """Print a table for each task, the commands behind its front, and the runs that still run, stopped or failed."""
    if not summary.settings:
        console.print("no finished runs")
    for task, metrics in summary.tasks.items():
        if metrics:
            _print_task(summary, task, metrics[0], console)
    unfinished = (("still running", summary.running), ("stopped", summary.stopped), ("failed", summary.failed))
    for title, runs in unfinished:
        if runs:
            console.print(f"\n[bold]{len(runs)} {title}[/]")
        for run in runs[:LISTED]:
            console.print(f"  {run.name}: {run.problem}", markup=False, highlight=False, soft_wrap=True)
        if len(runs) > LISTED:
            console.print(f"  and {len(runs) - LISTED} more, in runs.csv")


def _print_task(summary: Summary, task: str, metric: str, console: Console) -> None:
    front = summary.front_axes[task]
    lower = lower_is_better(metric)
    measured = [
        (i, spread.mean, setting)
        for i, setting in enumerate(summary.settings)
        if setting.task == task and (spread := setting.spread(metric)) is not None
    ]
    measured.sort(key=lambda entry: (entry[0] not in front, entry[1] if lower else -entry[1]))
    table = Table(title=f"{escape(task)}: {metric}, {'lower' if lower else 'higher'} is better", title_justify="left")
    table.add_column("setting", overflow="fold")
    for label in ("runs", metric, "kept", "compute", "wall clock, s"):
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("on the front of")
    for i, _, setting in measured[: len(front) + ROWS]:
        table.add_row(*_row(summary, setting, metric), front.get(i, ""), style=None if i in front else "dim")
    console.print()
    console.print(table)
    if note := describe_training_differences(summary, task):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(measured) > len(front) + ROWS:
        console.print(f"and {len(measured) - len(front) - ROWS} settings off the front, in runs.csv")
    for i, _, setting in measured[: len(front)]:
        if i in front and (command := summary.command(setting.runs[0])):
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _row(summary: Summary, setting: Setting, metric: str) -> list[str]:
    values = [setting.spread(name) for name in (metric, name_axis(metric, "kept"), name_axis(metric, "compute"))]
    seconds = setting.spread("train/seconds")
    return [
        escape(describe_setting(summary, setting)),
        str(len(setting.runs)),
        *(_format_spread(value) for value in values),
        f"{seconds.mean:,.0f}" if seconds else "",
    ]


def _format_spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")
