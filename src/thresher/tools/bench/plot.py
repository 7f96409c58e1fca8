"""Time against length, both logarithmic, with fitted exponents: a picture and a page.

matplotlib, a dependency, draws the picture, a PNG for a README. The page is one file that needs no network; to write it
needs plotly.
"""

from collections.abc import Iterator, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from thresher.tools.bench.summary import USUAL_DTYPE, Curve, Record, describe_crossovers, fit_exponent, group_curves

PARTS = {"forward": ("fwd_ms",), "forward + backward": ("train_fwd_ms", "bwd_ms")}
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
DENSE = "#000000"
CONFIG = {"displaylogo": False, "showSendToCloud": False}  # Plotly offers an upload to its servers by default


class Line(NamedTuple):
    """The times of one contender by length.

    Attributes:
        name: With the fitted exponent, where there are two lengths or more.
        colour: The same in every panel.
        lengths: Tokens, shortest first.
        times: Milliseconds.
    """

    name: str
    colour: str
    lengths: Sequence[int]
    times: Sequence[float]


class Panel(NamedTuple):
    """The lines of one pattern, forward alone or with backward."""

    title: str
    lines: Sequence[Line]


def build_panels(records: Sequence[Record]) -> list[Panel]:
    """Build a panel for each pattern, type and pass of attention, with dense attention in each; none without times."""
    lines = {curve: rows for curve, rows in group_curves(records).items() if not curve.model}
    names = list(dict.fromkeys(_name_line(curve) for curve in lines))
    found = []
    for pattern, dtype in dict.fromkeys((curve.pattern, curve.dtype) for curve in lines):
        here = {_name_line(c): rows for c, rows in lines.items() if (c.pattern, c.dtype) == (pattern, dtype)}
        for word, columns in PARTS.items():
            shown = [
                line
                for name, rows in here.items()
                for line in _fit_line(name, COLOURS[names.index(name) % len(COLOURS)], rows, columns)
            ]
            every = [row for rows in here.values() for row in rows]
            shown += _fit_line("dense", DENSE, every, tuple(f"dense_{c}" for c in columns))
            if shown:
                title = ", ".join(each for each in (pattern, dtype, word) if each != USUAL_DTYPE)
                found.append(Panel(title, shown))
    return found


def _name_line(curve: Curve) -> str:
    return str(curve._replace(dtype="", pattern=""))


def _fit_line(name: str, colour: str, rows: Sequence[Record], columns: Sequence[str]) -> Iterator[Line]:
    """Yield one line; of several times at one length, as dense attention has them, take the median."""
    times: dict[int, list[float]] = {}
    for row in rows:
        if all(row[c] is not None for c in columns):
            times.setdefault(int(row["n"]), []).append(sum(row[c] for c in columns))
    if times:
        lengths = sorted(times)
        values = [median(times[n]) for n in lengths]
        power = fit_exponent(lengths, values)
        yield Line(name if power is None else f"{name}: N^{power:.2f}", colour, lengths, values)


def draw_picture(path: Path, shown: Sequence[Panel]) -> None:
    """Draw the picture."""
    from matplotlib.figure import Figure

    columns = min(len(shown), len(PARTS))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(8.5 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, panel in zip(axes, shown, strict=False):
        for line in panel.lines:
            axis.plot(line.lengths, line.times, label=line.name, color=line.colour, marker="o", markersize=4, lw=1)
        axis.set(yscale="log", xlabel="tokens", ylabel="ms", title=panel.title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)


def write_page(path: Path, records: Sequence[Record], shown: Sequence[Panel]) -> None:
    """Write the page: the panels, where each contender wins, and every row.

    Raises:
        ModuleNotFoundError: plotly is not installed; the message says how to install it.
    """
    if find_spec("plotly") is None:
        raise ModuleNotFoundError(f"{path.name} needs plotly: pip install 'thresher[bench]'", name="plotly")
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    figures = [
        to_html(_build_figure(panel), include_plotlyjs=False, full_html=False, validate=False, config=CONFIG)
        for panel in shown
    ]
    said = "".join(f"<li>{escape(line)}</li>" for line in describe_crossovers(records))
    columns = [name for name in records[0] if any(r[name] not in (None, "") for r in records)]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_format_cell(row[c])}</td>" for c in columns) + "</tr>" for row in records)
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>thresher bench</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
        "<h1>Attention against dense attention, in one run</h1>"
        "<p>Medians of interleaved repetitions. N^e: the exponent fitted to time against tokens. Speed-ups are dense / "
        "this: below 1 is slower.</p>"
        f"{''.join(figures)}<h2>Where each wins</h2><ul>{said}</ul>"
        f"<h2>Rows</h2><div class='wide'><table><tr>{head}</tr>{body}</table></div></html>",
        encoding="utf-8",
    )


STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:12px}"
    "td,th{padding:.2rem .5rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
)


def _build_figure(panel: Panel) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(line.name),
            "x": list(line.lengths),
            "y": list(line.times),
            "line": {"color": line.colour, "dash": "dash" if line.colour == DENSE else "solid"},
        }
        for line in panel.lines
    ]
    lengths = sorted({n for line in panel.lines for n in line.lengths})
    layout = {
        "title": {"text": escape(panel.title)},
        "xaxis": {"type": "log", "title": {"text": "tokens"}, "tickvals": lengths, "ticktext": list(map(str, lengths))},
        "yaxis": {"type": "log", "title": {"text": "ms"}},
        "height": 480,
    }
    return {"data": traces, "layout": layout}


def _format_cell(value: Any) -> str:
    return "" if value is None else escape(f"{value:.4g}" if isinstance(value, float) else str(value))
