"""Runs as the report reads them, and the files and the table that it makes of them."""

import csv
import json
import math
import os
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from tests import warm
from tests.running import CONF, TINY
from tests.tools.report.conftest import HOSTILE
from thresher.config.overrides import compose_config
from thresher.results.configs import exclude, read_config
from thresher.results.runs import Run, find_runs, read_run
from thresher.tools.report.__main__ import main
from thresher.tools.report.details import choose_runs, read_details
from thresher.tools.report.files import write_front
from thresher.tools.report.settings import find_dense_twins, group_runs, lower_is_better, name_tasks, rank_metrics
from thresher.tools.report.summary import (
    Summary,
    describe_setting,
    describe_training_differences,
    format_value,
    summarise,
)
from thresher.tools.report.table import print_summary


def test_runs_of_other_seeds_are_one_setting_and_an_evaluation_is_another(summary: Summary) -> None:
    found = {(s.mechanism, bool(s.identity[0])): len(s.runs) for s in summary.settings}
    assert found == {("dense", False): 1, ("latte", False): 2, ("latte", True): 1}


def test_mean_and_deviation_are_those_over_seeds(summary: Summary, runs: Path) -> None:
    setting = next(s for s in summary.settings if len(s.runs) == 2)
    values = [json.loads((runs / f"latte{i}" / "metrics.json").read_text())["test/loss"] for i in (0, 1)]
    spread = setting.spread("test/loss")
    assert spread is not None
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.deviation == pytest.approx(statistics.stdev(values))
    assert setting.spread("test/perplexity") is None


def test_the_dense_twin_is_the_dense_run_of_the_same_training(summary: Summary) -> None:
    dense = next(i for i, s in enumerate(summary.settings) if s.mechanism == "dense")
    latte = next(i for i, s in enumerate(summary.settings) if len(s.runs) == 2)
    assert summary.twins[latte] == dense
    for run in summary.settings[latte].runs:
        run.config["trainer.max_epochs"] = 7
    assert latte not in find_dense_twins(summary.settings)
    for run in summary.settings[latte].runs:
        run.config["trainer.max_epochs"] = 1


def test_a_run_without_metrics_says_why(summary: Summary) -> None:
    (run,) = summary.failed
    assert run.name == HOSTILE
    assert run.problem == "no metrics.json: not finished: <b>out of memory</b>"
    assert "begun" in run.excerpt


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ('{"test/acc": null, "train/seconds": 1}', "not a finite number: test/acc"),
        ('{"train/seconds": 1}', "trained, but its test is not finished"),
        ('{"test/acc": "<b>"}', "not a table of names and numbers"),
        ("{", "metrics.json cannot be read"),
    ],
)
def test_results_that_cannot_count_are_told(runs: Path, tmp_path: Path, metrics: str, problem: str) -> None:
    shutil.copy(runs / "dense" / "config.yaml", tmp_path)
    (tmp_path / "metrics.json").write_text(metrics)
    written_long_ago(tmp_path)
    assert problem in read_run(tmp_path, "x").problem


def test_details_say_what_data_a_run_has_read(runs: Path, tmp_path: Path) -> None:
    parts = json.loads((runs / "dense" / "data.json").read_text())["parts"]
    shown = read_details(read_run(runs / "dense", "x"))["data"]
    assert [[name, f"{name}: {said}"] for name, said in shown] == [[part["name"], part["line"]] for part in parts]
    for broken in ("", "{}", '{"parts": [3]}'):
        (tmp_path / "data.json").write_text(broken)
        assert read_details(Run(tmp_path, "x"))["data"] is None
    (tmp_path / "data.json").unlink()
    assert read_details(Run(tmp_path, "x"))["data"] is None


def written_long_ago(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (1e9, 1e9))


def test_a_run_that_goes_on_is_not_one_that_failed(runs: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("metrics.json")
    for name in ("goes_on", "stopped", "crashed", "told"):
        shutil.copytree(runs / "dense", tmp_path / name, ignore=ignored)
        (tmp_path / name / "train.log").write_text(
            "[now][x][WARNING] - an error of 3 % is usual\n[now][x][INFO] - ok\n"
        )
    written_long_ago(tmp_path / "stopped")
    (tmp_path / "crashed" / "train.log").write_text("[now][x][ERROR] - CUDA out of memory\n(HYDRA_FULL_ERROR=1 ...)\n")
    (tmp_path / "told" / "exit_code").write_text("0")
    summary = summarise([tmp_path], CONF, lambda sequence, title: sequence)
    assert [run.name for run in summary.running] == ["goes_on"]
    assert summary.running[0].problem.startswith("still running, last written ")
    assert [run.name for run in summary.failed] == ["crashed", "stopped", "told"]
    assert main([f"runs='{tmp_path}'"]) == 0
    with (tmp_path / "runs.csv").open() as file:
        states = {row["run"]: row["status"] for row in csv.DictReader(file)}
    assert states == {"goes_on": "running", "crashed": "failed", "stopped": "failed", "told": "failed"}
    assert json.loads((tmp_path / "front.json").read_text())["counts"]["running"] == 1
    page = (tmp_path / "report.html").read_text()
    assert 'id="running"' in page
    assert 'id="failed"' in page


@pytest.mark.parametrize(
    ("code", "status"), [(130, "stopped"), (143, "stopped"), (138, "stopped"), (137, "failed"), (1, "failed")]
)
def test_a_run_that_a_signal_stopped_is_not_one_that_failed(
    code: int, status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.log").write_text("[now][x][INFO] - begun\n")
    (tmp_path / "mine" / "exit_code").write_text(f"{code}\n")
    (run,) = summarise([tmp_path], None, lambda sequence, title: sequence).runs
    assert run.status == status
    assert main([f"runs='{tmp_path}'"]) == 0
    assert f"1 {status}" in capsys.readouterr().out
    counts = json.loads((tmp_path / "front.json").read_text())["counts"]
    assert (counts["stopped"], counts["failed"]) == ((1, 0) if status == "stopped" else (0, 1))
    assert f'<section id="{status}"' in (tmp_path / "report.html").read_text()


def test_a_folder_is_read_once_whatever_links_lead_to_it(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    shutil.copytree(runs / "dense", tmp_path / "here" / "run")
    shutil.copytree(runs / "latte0", tmp_path / "elsewhere" / "latte0")
    (tmp_path / "here" / "another").symlink_to(tmp_path / "here" / "run")
    (tmp_path / "here" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "round").symlink_to(tmp_path / "here")
    found = {name: path for path, name in find_runs([tmp_path / "here"])}
    assert sorted(found) == ["far/latte0", "run"]
    assert len(find_runs([tmp_path / "here", tmp_path / "elsewhere", tmp_path / "here" / "round"])) == 2


def test_a_run_that_was_refused_at_its_data_does_not_still_run(tmp_path: Path) -> None:
    """Nothing but its exit code tells it from a run that reads its data."""
    folder = tmp_path / "refused"

    def start(override: str) -> int:
        return warm.run([str(warm.ROOT / "train.py"), *TINY, f"run.dir='{folder}'", override]).returncode

    assert start("data.limit_train=1000000") == 1
    run = read_run(folder, "refused")
    assert not run.running
    assert run.problem.startswith("exit code 1: data.limit_train=1000000")
    assert start("data.limit_train=0") == 1  # resumed, and refused for another reason
    assert (folder / "exit_code").read_text() == "1\n"


def changed(run: Run, **config: object) -> Run:
    keys = {key.replace("__", "."): value for key, value in config.items()}
    return Run(run.folder, run.name, run.config | keys, run.metrics)


def test_a_front_holds_one_data_set_and_one_model(summary: Summary) -> None:
    (run,) = (r for r in summary.runs if r.name == "latte0")
    alike = changed(
        run, data__batch_size=3, data__limit_train=9, model__drop_path_rate=0.2, attention__estimate__bits=8
    )
    assert name_tasks([run, alike]) == ["FashionMNIST12k, vit_tiny_patch16_224, classification"] * 2
    others = [
        changed(run, data__image_size=56),
        changed(run, model__depth=7),
        changed(run, model__name="deit3_small_patch16_224"),
        changed(run, data___target_="thresher.data.cifar.CIFAR10"),
        changed(run, task___target_="thresher.tasks.text_classification.TextClassification"),
    ]
    names = name_tasks([run, *others])
    assert len(set(names)) == 6
    assert "model.depth=7" in names[2]
    assert names[4].startswith("CIFAR10, ")
    both = Summary([run, others[1]], ["", ""])
    assert all(len({both.settings[i].task for i in front.places}) == 1 for front in both.fronts)
    assert {front.task for front in both.fronts} == set(name_tasks(both.runs))


def test_other_test_data_are_another_front(summary: Summary) -> None:
    (run,) = (r for r in summary.runs if r.name == "latte0")
    others = [
        changed(run, trainer__limit_test_batches=7),
        changed(run, trainer__fast_dev_run=True),
        changed(run, data__test="held_out.csv"),
    ]
    names = name_tasks([run, *others])
    assert len(set(names)) == 4
    assert "trainer.limit_test_batches=7" in names[1]
    assert "data.test=held_out.csv" in names[3]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.max_epochs", 9),
        ("trainer.max_steps", 100),
        ("trainer.limit_train_batches", 3),
        ("trainer.overfit_batches", 2),
        ("data.limit_train", 9),
        ("data.val_fraction", 0.2),
        ("data.seed", 5),
        ("init_from", "dense.ckpt"),
    ],
)
def test_a_front_of_different_trainings_names_what_differs(
    summary: Summary, key: str, value: object, tmp_path: Path
) -> None:
    (run,) = (r for r in summary.runs if r.name == "latte0")
    same = changed(run, compute__target=0.3)
    assert describe_training_differences(Summary([run, same], ["", ""]), name_tasks([run])[0]) == ""
    both = Summary([run, changed(run, **{key: value})], ["", ""])
    (task,) = both.tasks
    note = describe_training_differences(both, task)
    assert f"{key} ({format_value(key, run.config[key])}, {value})" in note
    write_front(both, tmp_path / "front.json")
    fronts = json.loads((tmp_path / "front.json").read_text())["fronts"]
    assert all(front["differs_in_training"] == {key: [run.config[key], value]} for front in fronts)
    with (tmp_path / "printed").open("w") as file:
        print_summary(both, Console(file=file, width=400))
    assert note in (tmp_path / "printed").read_text()


def test_settings_are_named_by_what_tells_them_from_others_of_their_mechanism(summary: Summary) -> None:
    (dense,) = (r for r in summary.runs if r.name == "dense")
    (run,) = (r for r in summary.runs if r.name == "latte0")
    own = (0.1, False), (0.2, False), (0.2, True), (0.3, False)
    lattes = [changed(run, compute__target=target, attention__always=fixed) for target, fixed in own]
    topk = changed(dense, attention___target_="thresher.attention.topk.TopK", compute__target=0.7, attention__keys=3)
    both = Summary([dense, *lattes, topk], [""] * 6)
    assert [describe_setting(both, setting) for setting in both.settings] == [
        "dense",
        "latte  compute.target=0.1",
        "latte  compute.target=0.2",
        "latte  compute.target=0.2 attention.always=true",
        "latte  compute.target=0.3",
        "topk",
    ]


def test_the_first_metric_is_that_of_the_kind_of_task(summary: Summary) -> None:
    (run,) = (r for r in summary.runs if r.name == "latte0")
    text = Run(run.folder, "text", run.config, {"test/perplexity": 9.0, "test/acc": 0.3, "test/loss": 2.2})
    assert rank_metrics(group_runs([run]))[0] == "test/acc"
    assert rank_metrics(group_runs([text]))[0] == "test/perplexity"
    assert rank_metrics(group_runs([changed(text, optimized_metric="test/loss")]))[0] == "test/loss"
    assert [lower_is_better(name) for name in ("test/acc", "test/f1", "test/perplexity", "val/loss")] == [
        *(False, False),
        *(True, True),
    ]


def test_a_run_that_ended_before_its_config_and_one_with_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("error: there is no attention=lattee\n(HYDRA_FULL_ERROR=1 shows it)\n")
    assert "ended before it had a config: error: there is no attention=lattee" in read_run(tmp_path, "x").problem
    for code, problem in ((1, "exit code 1: "), (137, "stopped by SIGKILL: "), (300, "exit code 300: ")):
        (tmp_path / "exit_code").write_text(str(code))
        assert read_run(tmp_path, "x").problem.startswith(problem)


def test_a_config_that_is_no_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1\n")
    assert "config.yaml cannot be read" in read_run(tmp_path, "x").problem


def test_paths_of_the_run_are_written_as_references(runs: Path) -> None:
    config = read_config((runs / "dense" / "config.yaml").read_text())
    assert config["callbacks.heads.path"] == "${run.dir}/heads.json"
    assert config["model.attention"] == "${attention}"


@pytest.mark.parametrize("name", ["dense", "latte0", "latte1"])
def test_the_command_composes_to_the_config_of_the_run(runs: Path, summary: Summary, name: str, tmp_path: Path) -> None:
    run = next(r for r in summary.runs if r.name == name)
    script, *overrides = shlex.split(summary.command(run))[1:]
    assert script == "train.py"
    assert_composes_to(read_config((runs / name / "config.yaml").read_text()), overrides, tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "data=shakespeare",
            "task=language_modeling",
            "model=transformer",
            "data.objective=denoising",
            "attention=topk",
        ],
        ["trainer=ddp", "trainer.devices=2", "callbacks=ema", "compute=lagrangian", "compute.quantity=macs"],
        [
            "attention.threshold=.inf",
            "callbacks=none",
            "logger=none",
            "optimizer.betas=[0.8,0.9]",
            "data.augment='a, b=c'",
        ],
        ["model=timm", "model.name=deit3_small_patch16_224", "attention=dense", "compute=free", "+model.extra={a: 1}"],
        ["model=transformer", "attention@model.cross=dense", "data=shakespeare", "task=language_modeling"],
        ["experiment=vit_fashion_mnist_latte", "+data.note=null", "~model.global_pool", "data.limit_train=64"],
    ],
    ids=lambda value: value[0],
)
def test_commands_of_any_config_compose_to_it(overrides: list[str], tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    (tmp_path / "run").mkdir()
    cfg = compose_config(CONF, "train", [*overrides, "run.name=x", f"run.dir='{tmp_path}/run'"])
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    OmegaConf.save(resolved, tmp_path / "run" / "config.yaml")
    assert main([f"runs='{tmp_path}'"]) == 0
    with (tmp_path / "runs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    wanted = read_config((tmp_path / "run" / "config.yaml").read_text())
    assert_composes_to(wanted, shlex.split(row["command"])[2:], tmp_path)


def assert_composes_to(wanted: dict[str, object], overrides: list[str], tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    again = compose_config(CONF, "train", [*overrides, "run.name=x", f"run.dir='{tmp_path}/again'"])
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(again, resolve=True)), tmp_path / "again.yaml")
    aside = ("run", "logger", "tags", "optimized_metric")
    assert exclude(read_config((tmp_path / "again.yaml").read_text()), *aside) == exclude(wanted, *aside)


def test_the_command_of_an_evaluation_names_checkpoint_and_change(runs: Path, summary: Summary) -> None:
    run = next(r for r in summary.runs if r.evaluation)
    command = shlex.split(summary.command(run))
    assert command[1] == "eval.py"
    assert command[2:] == [f"ckpt={runs}/latte0/checkpoints/best.ckpt", "attention.estimate.bits=8"]


def test_an_evaluation_below_its_run_is_of_its_best_checkpoint(tmp_path: Path) -> None:
    metrics: dict[str, float | None] = {"test/acc": 0.5}
    run = Run(tmp_path / "eval" / "now", "now", {"train": True, "ckpt_path": None}, metrics)
    assert run.checkpoint == tmp_path / "checkpoints" / "best.ckpt"
    assert Run(tmp_path / "elsewhere", "now", {"train": True, "ckpt_path": None}, metrics).checkpoint is None


def test_details_hold_heads_and_curves(summary: Summary, runs: Path) -> None:
    run = next(r for r in summary.runs if r.name == "latte0")
    found = read_details(run)
    written = json.loads((runs / "latte0" / "heads.json").read_text())["layers"]
    assert found["heads"]["layers"] == [layer["name"] for layer in written]
    assert found["heads"]["kept"][1][0] == pytest.approx(written[1]["heads"][0]["kept"], rel=1e-3)
    assert {"train/kept", "train/aim", "val/acc", "heads/blocks.0.attn.0/threshold"} <= set(found["curves"])
    dense = next(r for r in summary.runs if r.name == "dense")
    assert read_details(dense)["heads"]["threshold"] is None
    assert read_details(read_run(runs, "nothing")) == {"data": None, "heads": None, "curves": {}}


def test_details_are_of_runs_on_a_front_and_dense_ones_first(summary: Summary) -> None:
    assert len(choose_runs(summary, 2)) == 2
    assert len(choose_runs(summary, 100)) == len(summary.runs)


def test_files_hold_every_front_and_every_run(report: Path) -> None:
    fronts = json.loads((report.parent / "front.json").read_text())["fronts"]
    assert {(f["metric"], f["axis"]) for f in fronts} >= {("test/acc", "test/kept"), ("test/loss", "test/compute")}
    for front in fronts:
        costs = [point[front["axis"]]["mean"] for point in front["points"]]
        assert costs == sorted(costs)
        assert all(run["command"].startswith("python ") for point in front["points"] for run in point["runs"])
    with (report.parent / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert sum(row["status"] == "failed" for row in rows) == 1
    assert all(math.isfinite(float(row["test/acc"])) for row in rows if row["status"] == "finished")


def test_the_table_names_settings_commands_and_failures(runs: Path, tmp_path: Path) -> None:
    done = warm.run(["-m", "thresher.report", f"runs='{runs}'", f"run.dir='{tmp_path}'"])
    assert done.returncode == 0, done.stderr
    for part in ("test/acc, higher is better", "dense", "±", "python train.py", "out of memory", "report.html"):
        assert part in done.stdout


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"runs='{tmp_path}/nowhere'"]) == 1
    assert main([f"runs='{tmp_path}'", f"conf='{tmp_path}'"]) == 1
    errors = capsys.readouterr().err
    assert "there is no folder" in errors
    assert "has no train.yaml" in errors


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"runs='{tmp_path}'"]) == 0
    assert "No finished runs yet" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "front.json").read_text())["fronts"] == []
    assert "no finished runs" in capsys.readouterr().out
