"""The page in a real browser, from disk."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.running import tiny_config
from tests.tools.report.browsing import Opened
from tests.tools.report.conftest import HOSTILE
from thresher.tools.report.__main__ import main


def points(page: Any) -> Any:
    return page.locator("#front-plot .scatterlayer .trace path.point")


def test_hovering_a_point_shows_its_command_and_its_differences(opened: Opened) -> None:
    page = opened.page
    box = points(page).first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#front-plot .hoverlayer text")
    hovered = page.locator("#front-plot .hoverlayer").text_content()
    assert "python " in hovered
    card = page.locator("#card").text_content()
    assert "python train.py" in card or "python eval.py" in card
    assert "wall clock" in card
    assert "compute (MACs)" in card


def test_axes_and_metrics_change_the_front(opened: Opened) -> None:
    page = opened.page
    assert "kept" in page.locator("#front-plot .xtitle").text_content()
    before = page.evaluate("document.getElementById('front-plot').data.map(t => t.x)")
    page.locator("#axis input[value=compute]").check(force=True)
    assert "compute" in page.locator("#front-plot .xtitle").text_content()
    assert page.evaluate("document.getElementById('front-plot').data.map(t => t.x)") != before
    page.select_option("#metric", label="test loss")
    assert page.locator("#front-plot .ytitle").text_content() == "test loss"
    assert "lower is better" in page.locator("#front-note").text_content()


def test_choosing_a_run_changes_heads_and_curves(opened: Opened) -> None:
    page = opened.page
    opened.seen("#heat-kept")
    page.select_option("#chosen", label="latte0")
    first = page.evaluate("document.getElementById('heat-kept').data[0].z")
    assert page.locator("#heat-threshold").is_visible()
    assert page.evaluate("document.getElementById('curve-threshold').data.length") == 4
    page.select_option("#chosen", label="dense")
    assert page.evaluate("document.getElementById('heat-kept').data[0].z") != first
    assert page.locator("#no-threshold").is_visible()
    assert page.locator("#run-data tr").all_text_contents()[2].startswith("test2,000 images, 10 classes of 200 each")


def test_names_stay_text(opened: Opened, report: Path) -> None:
    page = opened.page
    page.locator("#runs").scroll_into_view_if_needed()
    page.wait_for_selector("#run-table tbody tr")
    assert "<img src=x onerror=alert(1)>" in page.locator("#run-table").text_content()
    assert "</script><script>alert(1)</script><b>" in page.locator("#run-table").text_content()
    assert HOSTILE in page.locator("#failed").text_content()
    assert "<b>out of memory</b>" in page.locator("#failed").text_content()
    assert page.locator("img, b").count() == 0
    assert "<script>alert" not in report.read_text()


def test_the_policy_stops_scripts_that_are_not_the_pages_own(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.x = 1'}))"
    )
    assert opened.page.evaluate("window.x") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.page.close()


def test_a_run_table_sorts_filters_and_marks_differences(opened: Opened) -> None:
    page = opened.page
    page.locator("#runs").scroll_into_view_if_needed()
    page.wait_for_selector("#run-table tbody tr")
    page.get_by_role("button", name="Wall clock, s").click()
    assert page.locator("#run-table th[aria-sort=descending]").text_content() == "Wall clock, s"
    cells = page.locator("#run-table tbody tr td:nth-child(7)").all_text_contents()
    seconds = [float(cell.replace(",", "")) for cell in cells if cell not in ("", "–")]
    assert seconds == sorted(seconds, reverse=True)
    assert page.locator("#run-table .odd").count() > 0
    page.fill("#filter", "attention=dense")
    assert page.locator("#run-table tbody tr").count() == 1


def test_the_front_is_walked_by_keys(opened: Opened) -> None:
    page = opened.page
    page.focus("#front-plot")
    seen = set()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    for _ in range(4):
        seen.add(page.locator("#card").text_content())
        page.keyboard.press("ArrowRight")
    assert len(seen) >= 3


PLOTS = ("front-plot", "heat-kept", "heat-threshold", "curve-kept", "curve-threshold", "curve-metric", "clock-plot")
OVERLAPS = """id => {
    const boxes = (part) => [...document.querySelectorAll(`#${id} ${part}`)].map((e) => e.getBoundingClientRect());
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    const bars = boxes('.modebar').filter((b) => b.width > 0);
    const parts = ['.nsewdrag', '.legend', '.colorbar', '.xtitle', '.ytitle'];
    return [bars.length, parts.filter((part) => boxes(part).some((box) => bars.some((bar) => meet(bar, box))))];
}"""


@pytest.mark.parametrize("width", [760, 1280])
def test_mode_bars_lie_over_nothing(browser: Any, report: Path, width: int) -> None:
    opened = Opened(browser, report, width)
    opened.page.select_option("#chosen", label="latte0")
    for plot in PLOTS:
        opened.page.locator(f"#{plot}").scroll_into_view_if_needed()
        opened.page.wait_for_selector(f"#{plot} .main-svg")
        opened.page.locator(f"#{plot} .nsewdrag").hover(force=True)
        assert opened.page.evaluate(OVERLAPS, plot) == [1, []], plot
    buttons = opened.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert "Reset axes" in buttons
    assert "Share chart..." not in buttons  # would upload to Plotly's servers
    opened.page.close()


def test_a_front_of_different_trainings_says_so(browser: Any, runs: Path, tmp_path: Path) -> None:
    for name in ("dense", "latte0"):
        shutil.copytree(runs / name, tmp_path / name)
    assert main([f"runs='{tmp_path}'"]) == 0
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.page.locator("#front-warning").is_hidden()
    opened.page.close()
    config = tmp_path / "latte0" / "config.yaml"
    config.write_text(config.read_text().replace("max_epochs: 1\n", "max_epochs: 9\n"))
    assert main([f"runs='{tmp_path}'"]) == 0
    opened = Opened(browser, tmp_path / "report.html")
    assert "trainer.max_epochs (1, 9)" in opened.page.locator("#front-warning").inner_text()
    opened.page.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_nothing_overflows(browser: Any, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, width, scheme)
    for part in ("#heat", "#curves", "#clock-plot"):
        opened.seen(part)
    opened.page.locator("#runs").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#run-table tbody tr")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    rows = opened.page.locator("#run-table tbody tr")
    assert all(rows.nth(i).bounding_box()["height"] < 60 for i in range(rows.count()))  # each name on one line
    assert opened.complaints == []
    opened.page.close()


def test_pages_of_no_run_and_of_one_open(browser: Any, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    shutil.copytree(runs / "dense", tmp_path / "one" / "dense")
    for folder in ("none", "one"):
        assert main([f"runs='{tmp_path / folder}'"]) == 0
        opened = Opened(browser, tmp_path / folder / "report.html")
        assert opened.complaints == []
        opened.page.close()


def test_axes_around_a_single_point_begin_at_zero(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    (folder / "csv" / "version_0").mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(tiny_config(folder)))
    values = {"test/acc": 0.62, "test/kept": 0.3, "test/compute": 0.4, "train/seconds": 12.0}
    (folder / "metrics.json").write_text(json.dumps(values))
    (folder / "csv" / "version_0" / "metrics.csv").write_text("step,epoch,train/kept,val/acc\n3,0,0.8,0.61\n")
    assert main([f"runs='{tmp_path}/runs'"]) == 0
    opened = Opened(browser, tmp_path / "runs" / "report.html")
    for plot, largest in (("#front-plot", 0.62), ("#curve-metric", 0.61), ("#curve-kept", 0.8)):
        opened.seen(plot)
        low, high = opened.page.evaluate(f"document.querySelector('{plot}')._fullLayout.yaxis.range")
        assert low == 0
        assert largest < high < 1.5 * largest
    assert opened.complaints == []
    opened.page.close()


@pytest.mark.slow
def test_ten_thousand_runs_are_a_page_that_opens(browser: Any, runs: Path, tmp_path: Path) -> None:
    """10 budgets, 1,000 seeds each; docs/sweeps.md says how long it takes where nothing else runs."""
    files = {name: (runs / "latte0" / name).read_text() for name in ("config.yaml", "metrics.json", "heads.json")}
    log = (runs / "latte0" / "csv" / "version_0" / "metrics.csv").read_text()
    metrics = json.loads(files["metrics.json"])
    for i in range(10_000):
        seed, target = divmod(i, 10)
        folder = tmp_path / "runs" / f"{i:05}"
        (folder / "csv" / "version_0").mkdir(parents=True)
        config = files["config.yaml"].replace("seed: 0\n", f"seed: {seed}\n", 1)
        config = config.replace("target: 0.5\n", f"target: {0.05 * (target + 1):.2f}\n")
        (folder / "config.yaml").write_text(config.replace(str(runs / "latte0"), str(folder)))
        kept = {"test/kept": 0.05 * (target + 1), "test/acc": 0.5 + 0.02 * target + 0.0001 * (seed % 7)}
        (folder / "metrics.json").write_text(json.dumps(metrics | kept))
        (folder / "heads.json").write_text(files["heads.json"])
        (folder / "csv" / "version_0" / "metrics.csv").write_text(log)
    began = time.monotonic()
    assert main([f"runs='{tmp_path}/runs'"]) == 0
    written = time.monotonic()
    opened = Opened(browser, tmp_path / "runs" / "report.html")
    print(f"written in {written - began:.1f} s, open after {time.monotonic() - written:.1f} s")
    front = json.loads((tmp_path / "runs" / "front.json").read_text())
    assert front["counts"]["runs"] == 10_000
    assert front["counts"]["settings"] == 10
    opened.page.locator("#runs").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#run-table tbody tr")
    assert opened.page.locator("#run-table tbody tr").count() > 0
    assert opened.complaints == []
    opened.page.close()
