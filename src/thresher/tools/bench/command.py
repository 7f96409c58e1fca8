"""The command: compose and check the config, then measure, print and write every row."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from thresher.attention.options import check_choice
from thresher.config.commands import compose_options
from thresher.tools.bench import decoding, measure, overhead, recording, steps
from thresher.tools.bench.jobs import DTYPES, Job, Scene
from thresher.tools.bench.plot import build_panels, draw_picture, write_page
from thresher.tools.bench.records import build_record, write_records
from thresher.tools.bench.rows import (
    as_list,
    build_attention_jobs,
    build_decode_jobs,
    build_step_jobs,
    check_settings,
    describe_absent_peers,
)
from thresher.tools.bench.show import format_row, print_summary
from thresher.tools.bench.targets import check_targets, compare_targets
from thresher.tools.bench.worker import CallResult, Worker, run_in_process

WHAT = ("attention", "decode", "train_step", "overhead")
MEASURES = {
    "attention": measure.measure_attention,
    "decode": decoding.measure_decoding,
}
OPTIONS = "bench.yaml"  # not config.yaml, which makes a folder a run
USUAL_HEADS, USUAL_HEAD_DIM = 8, 64
LATE = "not measured"
START_TOKENS = 1024  # attention of so many tokens takes about as long as the start of a process


class Stopped(Exception):
    """Raised by a signal that stops the benchmark."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def bench(conf: Path, arguments: Sequence[str]) -> int:
    """Run the benchmark; return 0 if every row was measured, 1 if one failed, 128 + signal after an interrupt.

    Raises:
        ValueError: An option has a wrong value; the message says what to change.
        FileNotFoundError: There is no such checkpoint.
    """
    cfg = compose_options(conf, "bench", arguments)
    what = check_options(cfg)
    check_settings(cfg, conf)
    folder = Path(cfg.run.dir)
    if (folder / OPTIONS).exists():
        raise ValueError(f"{folder} already holds a benchmark: choose another run.dir")
    scenes = build_scenes(cfg)
    jobs = [job for scene in scenes for job in _build_random_jobs(cfg, conf, scene, what)]
    folder.mkdir(parents=True, exist_ok=True)
    if "attention" in what and cfg.inputs != "random":
        jobs = [*(job for scene in scenes for job in _build_recorded_jobs(cfg, conf, scene, folder)), *jobs]
    asked = OmegaConf.create({key: value for key, value in cfg.items() if key != "help"})
    OmegaConf.save(asked, folder / OPTIONS)
    for absent in describe_absent_peers() if cfg.peers else ():
        print(absent)
    records: list[dict[str, Any]] = []
    code = 0
    try:
        with _raise_on_signals():
            for record in _measure_rows(jobs, cfg.limit):
                records.append(record)
                write_records(folder, records)
            if "overhead" in what:
                overhead.measure_overhead(cfg, conf, scenes[0], folder)
    except Stopped as end:
        code = end.code
        print(f"{end}: {len(records)} of {len(jobs)} rows are in {folder}", file=sys.stderr)
    if records:
        print_summary(records, compare_targets(_to_plain(cfg.targets), records))
        print(f"\n{folder}/{', '.join(['bench.csv', 'bench.json', *_draw_pictures(folder, records)])}")
    return code or int(any(record["status"] not in ("ok", LATE) for record in records))


def check_options(cfg: DictConfig) -> list[str]:
    """Check the options that need no mechanism; return the parts to time.

    Raises:
        ValueError: An option has a wrong value.
    """
    for part in as_list(cfg.what):
        check_choice("what", part, WHAT)
    for dtype in as_list(cfg.dtype):
        check_choice("dtype", dtype, DTYPES)
    check_choice("device", cfg.device, ("auto", "cpu", "cuda"))
    for name in ("repetitions", "batch", "heads", "head_dim", "threads"):
        if cfg[name] is not None and (not isinstance(cfg[name], int) or cfg[name] < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {cfg[name]}")
    if cfg.limit is not None and not (isinstance(cfg.limit, int | float) and cfg.limit > 0):
        raise ValueError(f"limit is a number of seconds above 0, or null for none; got {cfg.limit}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no such device; device=cpu times the processor")
    check_targets(_to_plain(cfg.targets))
    return as_list(cfg.what)


def build_scenes(cfg: DictConfig) -> list[Scene]:
    """Build the conditions that rows share, for each type."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    scene = Scene(
        batch=cfg.batch,
        heads=cfg.heads or USUAL_HEADS,
        head_dim=cfg.head_dim or USUAL_HEAD_DIM,
        dtype="float32",
        device=automatic if cfg.device == "auto" else cfg.device,
        threads=cfg.threads,
        repetitions=cfg.repetitions,
        seconds=cfg.seconds,
        backward=cfg.backward,
        memory=cfg.memory,
        inputs=str(cfg.inputs),
        seed=cfg.seed,
    )
    return [replace(scene, dtype=dtype) for dtype in as_list(cfg.dtype)]


def _build_random_jobs(cfg: DictConfig, conf: Path, scene: Scene, what: Sequence[str]) -> list[tuple[Job, Scene]]:
    """Build the jobs that draw their inputs."""
    drawing = replace(scene, inputs="random")
    jobs = build_attention_jobs(cfg, conf, scene, None) if "attention" in what and scene.inputs == "random" else []
    jobs += build_decode_jobs(cfg, conf, scene) if "decode" in what else []
    jobs += build_step_jobs(cfg, conf, scene) if "train_step" in what else []
    return [(job, drawing) for job in jobs]


def _build_recorded_jobs(cfg: DictConfig, conf: Path, scene: Scene, folder: Path) -> list[tuple[Job, Scene]]:
    """Record the calls of the attention in a checkpoint's network, and build the jobs that time it.

    Raises:
        ValueError: The calls cannot be recorded, or the config sets sizes that the network fixes.
    """
    if cfg.heads is not None or cfg.head_dim is not None:
        raise ValueError("heads and head_dim are the checkpoint's own with inputs=PATH; leave them out")
    answer = run_in_process(
        recording.record_inputs, Path(scene.inputs), conf, folder / "inputs.pt", scene.batch, scene.seed
    )
    if answer.error is not None:
        raise ValueError(f"inputs={scene.inputs}: {answer.error}")
    found: Any = answer.value
    jobs = []
    for pattern, (batch, heads, _, head_dim) in found["shapes"].items():
        own = replace(scene, batch=batch, heads=heads, head_dim=head_dim, inputs=str(folder / "inputs.pt"))
        size = f"{batch} examples, {heads} heads of {head_dim} in all layers, {found['lengths'][pattern]} tokens"
        print(f"recorded {pattern}: {size}", flush=True)
        jobs += [(job, own) for job in build_attention_jobs(cfg, conf, own, found) if job.pattern == pattern]
    return jobs


def _measure_rows(jobs: Sequence[tuple[Job, Scene]], limit: float | None) -> Iterator[dict[str, Any]]:
    """Measure and print one row after another.

    A contender that fails its check is not timed, and nothing is that would begin after `limit` seconds.
    """
    whole = sum(_estimate_effort(job) for job, _ in jobs)
    done, start = 0, time.monotonic()
    wrong: dict[tuple[Any, ...], str | None] = {}
    with Worker() as checker:
        for job, scene in jobs:
            if done and limit is not None and time.monotonic() - start > limit:
                yield build_record(job, scene, {}, LATE, f"it would have begun after limit={limit:g} seconds")
                continue
            key = *job.check_key, scene.dtype
            if job.target is not None and key not in wrong:
                longest = max(other.n for other, where in jobs if (*other.check_key, where.dtype) == key)
                answer = checker.call(measure.find_fault, replace(job, n=longest), scene)
                wrong[key] = answer.value or answer.error
            if wrong.get(key) is not None:
                record = build_record(job, scene, {}, "FAIL", str(wrong[key]))
            else:
                record = _measure_row(job, scene)
            done += _estimate_effort(job)
            left = (time.monotonic() - start) * (whole - done) / done
            print(format_row(record, done / whole, time.strftime("%H:%M:%S", time.gmtime(left))), flush=True)
            yield record


def _measure_row(job: Job, scene: Scene) -> dict[str, Any]:
    """Measure one row in its own process."""
    answer = run_in_process(MEASURES.get(job.model, steps.measure_step), job, scene)
    if answer.error is not None:
        return build_record(job, scene, {}, "error", answer.error)
    row = dict(answer.value)
    if scene.memory and "peak_mb" not in row and job.model == "attention":
        peaks = {
            name: run_in_process(measure.measure_peak, job, scene, name != "peak_mb")
            for name in ("peak_mb", "dense_peak_mb")
        }
        row |= {name: peak.value for name, peak in peaks.items()}
    own = {key: row.pop(key) for key in ("heads", "head_dim", "batch") if key in row}
    return build_record(job, replace(scene, **own), row, "ok", _notes(answer))


def _draw_pictures(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw the curves, if there are any; return the names of the files."""
    shown = build_panels(records)
    if not shown:
        return []
    draw_picture(folder / "bench.png", shown)
    try:
        write_page(folder / "bench.html", records, shown)
    except ModuleNotFoundError as error:
        print(error)
        return ["bench.png"]
    return ["bench.png", "bench.html"]


def _notes(answer: CallResult) -> str:
    return "; ".join(answer.warnings[:3])


def _estimate_effort(job: Job) -> int:
    """Estimate the time of a row in arbitrary units: to start a process, and to attend to pairs."""
    return START_TOKENS**2 + (job.n if job.model == "decode" else job.n**2)


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Raise an exception at SIGINT and SIGTERM, so that the finished rows are still shown."""

    def end(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_plain(node: Any) -> list[Mapping[str, Any]]:
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return plain
