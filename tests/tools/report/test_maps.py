"""Attention maps on their way to the page, and on it, in a real browser."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.report.browsing import Opened
from thresher.results.runs import Run
from thresher.tools.report import maps
from thresher.tools.report.__main__ import main
from thresher.tools.report.maps import load_maps


def stored(runs: Path) -> dict[str, np.ndarray]:
    with np.load(runs / "est8" / "explain" / "example_3.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_maps_on_the_page_are_those_in_the_files(runs: Path) -> None:
    found, problems = load_maps([Run(runs / "dense", "dense"), Run(runs / "est8", "est8")])
    assert problems == []
    assert [(example["run"], example["example"]) for example in found] == [(1, 0), (1, 3)]
    for i, layer in enumerate(found[1]["layers"]):
        kept = np.unpackbits(stored(runs)[f"layer.{i}.kept"], axis=-1, count=49).astype(bool)
        for kind in ("weights", "effective"):
            wanted = stored(runs)[f"layer.{i}.{kind}"].astype(float)
            wanted = np.where(kept, wanted, 0) if kind == "weights" else wanted
            signed = np.frombuffer(base64.b64decode(layer[kind]["bytes"]), np.int8).reshape(wanted.shape) / 127
            largest = np.reshape(layer[kind]["largest"], (*wanted.shape[:2], 1))
            off = np.abs(np.sign(signed) * signed**2 * largest - wanted)
            assert (off <= 0.016 * largest).all()
        bytes_ = np.frombuffer(base64.b64decode(layer["weights"]["bytes"]), np.int8).reshape(kept.shape)
        np.testing.assert_array_equal(bytes_ != 0, kept)


def test_a_broken_example_is_told_and_the_others_are_shown(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "est8", tmp_path / "a")
    (tmp_path / "a" / "explain" / "example_0.npz").write_bytes(b"PK")
    (tmp_path / "a" / "explain" / "example_9.json").write_text("{}")
    found, problems = load_maps([Run(tmp_path / "a", "a")])
    assert [example["example"] for example in found] == [3]
    assert sorted(problem.partition(" ")[0] for problem in problems) == [
        "a/explain/example_0.json",
        "a/explain/example_9.json",
    ]


def test_a_page_holds_as_many_as_fit_and_says_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "BUDGET", 1000)
    found, problems = load_maps([Run(runs / "est8", "est8")])
    assert len(found) == 1
    assert problems == ["1 more examples are not in this page: report on the folders of their runs to see them"]


def ready(opened: Opened) -> Any:
    opened.page.locator("#maps").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#map-grid canvas")
    return opened.page


def pixels(page: Any, selector: str) -> str:
    return str(page.evaluate("s => document.querySelector(s).toDataURL()", selector))


def test_choosing_example_layer_head_and_query_changes_what_is_drawn(opened: Opened, runs: Path) -> None:
    page = ready(opened)
    page.select_option("#map-example", "1")
    example = json.loads((runs / "est8" / "explain" / "example_3.json").read_text())
    assert example["label"] in page.locator("#map-note").text_content()
    seen = {pixels(page, "#map-weights .picture")}
    page.select_option("#map-layer", "1")
    seen.add(pixels(page, "#map-weights .picture"))
    page.select_option("#map-head", "1")
    seen.add(pixels(page, "#map-weights .picture"))
    page.fill("#map-query", "40")
    seen.add(pixels(page, "#map-weights .picture"))
    assert len(seen) == 4
    head = example["layers"][1]["heads"][1]
    kept = np.unpackbits(stored(runs)["layer.1.kept"], axis=-1, count=49)[1, 40].sum()
    assert f"Query 40, patch (5, 5), kept {kept} of 49 keys" in page.locator("#map-query-name").text_content()
    assert f"threshold{head['threshold']:.3f}" in page.locator("#map-facts").text_content().replace(" ", "")
    assert pixels(page, "#map-effective .matrix") != pixels(page, "#map-weights .matrix")


def test_heads_and_queries_are_walked_by_keys_and_by_clicks(opened: Opened) -> None:
    page = ready(opened)
    page.locator("#map-grid [aria-pressed=true]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert (page.input_value("#map-layer"), page.input_value("#map-head")) == ("1", "1")
    page.focus("#map-weights")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#map-query") == "17"  # one row of 7 patches above the middle one
    box = page.locator("#map-weights .picture").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] - 3)
    assert page.input_value("#map-query") == "48"


def test_a_text_is_shown_as_text_whatever_it_says(browser: Any, tmp_path: Path, runs: Path) -> None:
    text = ["<script>", "alert(1)", "</script>"]
    shutil.copytree(runs / "est8", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "explain")
    (tmp_path / "a" / "explain").mkdir()
    head = {"threshold": None, "kept": 2 / 3, "visible": 9, "ineffective": 0.0, "rank": 3}
    side = {"input": 0, "extra": 0}
    layer = {"name": "<b>", "attention": "dense", "pattern": "noncausal_self", "queries": side, "keys": side}
    example = {"example": 0, "label": "<i>", "predicted": "<u>", "texts": [text], "picture": None, "grid": None}
    about = example | {"layers": [layer | {"sampled_values": False, "heads": [head]}]}
    (tmp_path / "a" / "explain" / "example_0.json").write_text(json.dumps(about))
    kept = np.array([[[1, 1, 0], [0, 1, 1], [1, 0, 1]]], bool)
    weights = (kept / 2).astype(np.float16)
    arrays = {"layer.0.weights": weights, "layer.0.effective": weights, "layer.0.kept": np.packbits(kept, axis=-1)}
    np.savez_compressed(tmp_path / "a" / "explain" / "example_0.npz", **arrays)  # type: ignore[arg-type]
    assert main([f"runs='{tmp_path}'"]) == 0
    opened = Opened(browser, tmp_path / "report.html")
    page = ready(opened)
    page.fill("#map-query", "2")
    assert page.locator("#map-weights .text").text_content() == "".join(text)
    assert page.locator("#map-weights .text .on").all_text_contents() == ["<script>", "</script>"]
    assert "<i>, taken for <u>" in page.locator("#map-note").text_content()
    assert page.locator("#maps b, #maps i, #maps u").count() == 0
    assert opened.complaints == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_maps_do_not_overflow(browser: Any, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, width, scheme)
    page = ready(opened)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    page.close()
