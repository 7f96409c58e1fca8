"""What the rows say together: exponents, crossovers, verdicts, targets, records and pictures."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tools.bench.small import options, record
from thresher.tools.bench.plot import PARTS, build_panels, draw_picture, write_page
from thresher.tools.bench.records import FIELDS, write_records
from thresher.tools.bench.show import format_row, print_summary
from thresher.tools.bench.summary import describe_crossovers, describe_speed, find_crossover, fit_exponent
from thresher.tools.bench.targets import check_targets, compare_targets

ISSUE = (
    "mechanism, backend, pattern, n, heads, head_dim, dtype, fwd_ms, bwd_ms, dense_fwd_ms, dense_bwd_ms, "
    "speedup_fwd, speedup_fwd_bwd, peak_mb, dense_peak_mb, kept, mac_ratio, rel_error"
)


def rows(power: float = 1.0, name: str = "topk") -> list[dict[str, Any]]:
    """Rows whose time grows as N^power, beside a dense attention that grows as N^2; they meet at N = 100."""
    found = []
    for n in (50, 200, 400):
        own, dense = 100 * (n / 100) ** power, 100 * (n / 100) ** 2
        times = {"fwd_ms": own, "bwd_ms": 2 * own, "train_fwd_ms": own, "speedup_fwd": dense / own}
        times |= {"dense_fwd_ms": dense, "dense_bwd_ms": 2 * dense, "dense_train_fwd_ms": dense}
        found.append(record(n, name, **times, speedup_fwd_bwd=dense / own, kept=0.5))
    return found


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    assert fit_exponent([64, 128, 512], [3 * n**power for n in (64, 128, 512)]) == pytest.approx(power)
    assert fit_exponent([64], [1.0]) is None


@pytest.mark.parametrize(
    ("speedups", "wins_from"),
    [
        ([0.5, 1.5, 2.0], 2),
        ([2.0, 1.5, 1.2], 1),
        ([2.0, 0.5, 1.2], 3),
        ([2.0, 2.0, 0.9], None),
        ([0.5, 0.9, 1.0], None),
    ],
)
def test_a_crossover_is_the_length_from_which_on_all_win(speedups: list[float], wins_from: int | None) -> None:
    assert find_crossover([1, 2, 3], speedups) == wins_from


def test_where_it_is_slower_is_said_so() -> None:
    assert describe_speed(rows(1.0), "speedup_fwd") == "faster from N 200 on (best 4.00 at N 400)"
    assert str(describe_speed(rows(2.5), "speedup_fwd")).startswith("faster at N 50, but slower at N 400")
    slow = [record(n, fwd_ms=2.0, dense_fwd_ms=1.0, speedup_fwd=0.5) for n in (64, 128)]
    assert describe_speed(slow, "speedup_fwd") == "slower here at every N measured (best 0.50 at N 64)"
    assert describe_speed(slow, "speedup_step") is None
    assert describe_crossovers(slow) == [
        "topk reference noncausal_self: forward: slower here at every N measured (best 0.50 at N 64)"
    ]


def test_rows_of_another_type_are_a_curve_and_a_panel_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = [*rows(), *({**row, "dtype": "bfloat16", "fwd_ms": row["fwd_ms"] / 2} for row in rows())]
    assert [line.split(":")[0] for line in describe_crossovers(found)] == [
        "topk reference noncausal_self",
        "topk reference bfloat16 noncausal_self",
    ]
    panels = {panel.title: panel.lines for panel in build_panels(found)}
    assert list(panels) == [f"noncausal_self, {part}" for part in (*PARTS, *(f"bfloat16, {part}" for part in PARTS))]
    assert [2 * time for time in panels["noncausal_self, bfloat16, forward"][0].times] == list(
        panels["noncausal_self, forward"][0].times
    )
    print_summary(found, [])
    shown = capsys.readouterr().out
    assert "bfloat16" in shown
    assert "device" not in shown, "all rows are on the CPU"
    print_summary([{**row, "device": "cuda"} for row in rows()], [])
    assert "cuda" in capsys.readouterr().out


def test_a_record_begins_with_the_fields_that_were_promised() -> None:
    assert ", ".join(FIELDS) == ISSUE
    assert list(record())[: len(FIELDS)] == list(FIELDS)


def test_both_files_hold_every_row(tmp_path: Path) -> None:
    written = [*rows(), record(800, status="FAIL")]
    write_records(tmp_path, written)
    assert json.loads((tmp_path / "bench.json").read_text()) == written
    with (tmp_path / "bench.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["n"] for r in read] == ["50", "200", "400", "800"]
    assert float(read[1]["fwd_ms"]) == written[1]["fwd_ms"]
    assert (read[3]["status"], read[3]["fwd_ms"]) == ("FAIL", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.csv", "bench.json"]


def test_what_nobody_can_compute_is_null_not_nan() -> None:
    assert record(rel_error=float("nan"))["rel_error"] is None


def test_curves_carry_their_exponents_and_dense_is_beside_them() -> None:
    shown = build_panels([*rows(1.0), *rows(1.5, "yoso"), record(800, status="FAIL")])
    assert [panel.title for panel in shown] == ["noncausal_self, forward", "noncausal_self, forward + backward"]
    names = ["topk reference: N^1.00", "yoso reference: N^1.50", "dense: N^2.00"]
    assert [line.name for line in shown[0].lines] == [line.name for line in shown[1].lines] == names
    assert shown[0].lines[0].times == pytest.approx([50, 200, 400])
    assert shown[1].lines[0].times == pytest.approx([150, 600, 1200])
    assert build_panels([record(800, status="FAIL")]) == []


def test_the_picture_is_one(tmp_path: Path) -> None:
    draw_picture(tmp_path / "bench.png", build_panels(rows()))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network_and_cannot_be_written_into(tmp_path: Path) -> None:
    hostile = [{**row, "setting": "</script><script>alert(1)</script>"} for row in rows()]
    write_page(tmp_path / "bench.html", hostile, build_panels(hostile))
    text = (tmp_path / "bench.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text)
    assert "alert(1)</script>" not in text
    assert '"showSendToCloud": false' in text
    assert "N^1.00" in text
    assert "faster from N 200 on" in text


def test_without_plotly_the_page_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.tools.bench.plot.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'thresher\[bench\]'"):
        write_page(tmp_path / "bench.html", rows(), build_panels(rows()))


def test_a_row_that_failed_is_told_and_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    failed = record(800, status="FAIL") | {"note": "at the dense limit the output is off"}
    assert "FAIL: at the dense limit" in format_row(failed, 0.5, "00:01:00")
    print_summary([*rows(), failed], [])
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "at the dense limit the output is off (N 800)" in out
    assert "faster from N 200 on" in out


TARGET = {"where": {"mechanism": "topk", "n": 400}, "measure": "speedup_fwd"}


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"at_least": 3.0}, "met"),
        ({"at_least": 3.0, "aim": 4.0}, "aim met"),
        ({"at_least": 3.0, "aim": 5.0}, "met"),
        ({"at_least": 5.0, "aim": 6.0}, "missed"),
        ({"at_most": 3.0}, "missed"),
        ({"at_most": 4.5}, "met"),
    ],
)
def test_a_target_is_met_or_missed(bounds: dict[str, float], said: str) -> None:
    (found,) = compare_targets([TARGET | bounds], rows())
    assert found["verdict"] == said
    assert found["measured"] == pytest.approx(4.0)


def test_what_was_not_measured_meets_no_target() -> None:
    assert (
        compare_targets([{"where": {"n": 9}, "measure": "speedup_fwd", "at_least": 0.1}], rows())[0]["measured"] is None
    )
    assert compare_targets([{**TARGET, "at_least": 0.1}], [record(400, status="FAIL")])[0]["verdict"] == "not measured"


def test_growth_is_over_half_the_length_and_memory_over_a_whole_map() -> None:
    growth = {"where": {"n": 400}, "measure": "growth_fwd", "at_most": 2.3}
    assert compare_targets([growth], rows(1.0))[0]["measured"] == pytest.approx(2.0)
    share = {"where": {}, "measure": "map_share", "at_most": 0.25}
    assert compare_targets([share], [record(1024, peak_mb=2.0)])[0]["measured"] == pytest.approx(2.0 / (2 * 4))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"measure": "speed", "at_least": 1}, "no row has a 'speed'"),
        ({"measure": "fwd_ms"}, "either at_least or at_most"),
        ({"measure": "fwd_ms", "at_least": 1, "at_most": 2}, "either at_least or at_most"),
        ({"measure": "fwd_ms", "at_least": 1, "where": {"N": 3}}, "no row has a N"),
        ({"measure": "fwd_ms", "atleast": 1}, "atleast is no key of a target"),
    ],
)
def test_a_target_that_no_row_can_meet_is_an_error(target: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_targets([target])


def test_the_targets_of_headline_are_among_its_rows() -> None:
    """Each target names rows that bench=headline measures: none can go missing by a word."""
    from tests.running import CONF
    from thresher.tools.bench.command import build_scenes, check_options
    from thresher.tools.bench.rows import build_attention_jobs, build_step_jobs

    cfg = options("bench=headline")
    check_options(cfg)
    (scene,) = build_scenes(cfg)
    jobs = [*build_attention_jobs(cfg, CONF, scene, None), *build_step_jobs(cfg, CONF, scene)]
    known = [
        {"mechanism": j.name, "setting": j.knobs, "n": j.n, "model": None if j.model == "attention" else j.model}
        for j in jobs
    ]
    for target in cfg.targets:
        assert any(all(row[key] == value for key, value in target.where.items()) for row in known), target
