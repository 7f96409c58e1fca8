"""From a command line to rows: the config is composed and checked, every row measured, shown and written down."""

import re
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

from thresher import overrides
from thresher.attention.options import check_choice
from thresher.bench import decoding, measure, overhead, recorded, steps
from thresher.bench.jobs import DTYPES, Job, Scene
from thresher.bench.plot import draw, page, panels
from thresher.bench.records import record_of, write_records
from thresher.bench.rows import absent_peers, attention_jobs, check_settings, decode_jobs, listed, step_jobs
from thresher.bench.show import line, print_summary
from thresher.bench.targets import check_targets, judged
from thresher.bench.worker import Answer, Worker, alone

WHAT = ("attention", "decode", "train_step", "overhead")
MEASURES = {"attention": measure.measured, "decode": decoding.measured}  # of other models: a training step
SETTING = re.compile(r"^(bench\.settings\.[^=+~]+=)")
USUAL_HEADS, USUAL_HEAD_DIM = 8, 64
BEGINNING = 1024  # tokens to whose pairs a row attends in about the time that its process takes to begin


class Ended(Exception):
    """A signal asked for an end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def bench(conf: Path, arguments: Sequence[str]) -> int:
    """Run the benchmark that a command line describes; return the exit code.

    The code is 0 where every row was measured, 1 where one failed its check or could not be measured, and 128 + the
    signal's number after an interrupt.

    Raises:
        ValueError: An option cannot be; the message says what to change.
        FileNotFoundError: There is no such checkpoint.
    """
    cfg = compose(conf, arguments)
    what = chosen_parts(cfg.bench)
    check_settings(cfg.bench, conf)
    folder = Path(cfg.dir)
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} already holds a benchmark: choose another dir=")
    scene = scene_of(cfg.bench)
    jobs: list[tuple[Job, Scene]] = []
    if "attention" in what and scene.inputs == "random":
        jobs += [(job, scene) for job in attention_jobs(cfg.bench, conf, scene, None)]
    if "decode" in what:
        jobs += [(job, replace(scene, inputs="random")) for job in decode_jobs(cfg.bench, conf, scene)]
    if "train_step" in what:
        jobs += [(job, replace(scene, inputs="random")) for job in step_jobs(cfg.bench, conf, scene)]
    folder.mkdir(parents=True, exist_ok=True)
    if "attention" in what and scene.inputs != "random":
        jobs = [*_recorded_jobs(cfg.bench, conf, scene, folder), *jobs]
    asked = OmegaConf.create({key: value for key, value in cfg.items() if key != "help"})
    OmegaConf.save(asked, folder / "config.yaml")
    for absent in absent_peers() if cfg.bench.peers else ():
        print(absent)
    records: list[dict[str, Any]] = []
    code = 0
    try:
        with _signals():
            for record in _measured(jobs):
                records.append(record)
                write_records(folder, records)
            if "overhead" in what:
                overhead.run(cfg.bench, conf, scene, folder)
    except Ended as end:
        code = end.code
        print(f"{end}: {len(records)} of {len(jobs)} rows are in {folder}", file=sys.stderr)
    if records:
        print_summary(records, judged(_plain(cfg.bench.targets), records))
        print(f"\n{folder}/{', '.join(['bench.csv', 'bench.json', *_drawn(folder, records)])}")
    return code or int(any(record["status"] != "ok" for record in records))


def compose(conf: Path, arguments: Sequence[str]) -> DictConfig:
    """Compose conf/bench.yaml; a hyper-parameter of a contender needs no `+`, whether it is listed there or not.

    Raises:
        ValueError: There is no such option or choice.
    """
    given = [argument for argument in arguments if not SETTING.match(argument)]
    overrides.check(conf, "bench", given)
    if swept := [o.key_or_group for o in overrides.parse(arguments) if o.is_sweep_override()]:
        raise ValueError(f"{swept[0]} takes a list in brackets here: '{swept[0]}=[a,b]'")
    return overrides.compose_config(conf, "bench", [SETTING.sub(r"++\1", argument) for argument in arguments])


def chosen_parts(cfg: DictConfig) -> list[str]:
    """Return what is to be timed.

    Raises:
        ValueError: An option that stands for itself cannot be.
    """
    for part in listed(cfg.what):
        check_choice("bench.what", part, WHAT)
    check_choice("bench.dtype", cfg.dtype, DTYPES)
    check_choice("bench.device", cfg.device, ("auto", "cpu", "cuda"))
    for name in ("repetitions", "batch", "heads", "head_dim", "threads"):
        if cfg[name] is not None and (not isinstance(cfg[name], int) or cfg[name] < 1):
            raise ValueError(f"bench.{name} must be a whole number of at least 1, got {cfg[name]}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench.device=cuda, but PyTorch sees no such device")
    check_targets(_plain(cfg.targets))
    return listed(cfg.what)


def scene_of(cfg: DictConfig) -> Scene:
    """Return what all rows share."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return Scene(
        batch=cfg.batch,
        heads=cfg.heads or USUAL_HEADS,
        head_dim=cfg.head_dim or USUAL_HEAD_DIM,
        dtype=cfg.dtype,
        device=automatic if cfg.device == "auto" else cfg.device,
        threads=cfg.threads,
        repetitions=cfg.repetitions,
        seconds=cfg.seconds,
        backward=cfg.backward,
        memory=cfg.memory,
        inputs=str(cfg.inputs),
        seed=cfg.seed,
    )


def _recorded_jobs(cfg: DictConfig, conf: Path, scene: Scene, folder: Path) -> list[tuple[Job, Scene]]:
    """Record what the attention of a checkpoint's network sees, and return the rows that time it.

    Raises:
        ValueError: It cannot be recorded, or the config asks for other sizes than it has.
    """
    if cfg.heads is not None or cfg.head_dim is not None:
        raise ValueError(
            "bench.heads and bench.head_dim are the checkpoint's own with bench.inputs=PATH; leave them out"
        )
    answer = alone(recorded.record, Path(scene.inputs), conf, folder / "inputs.pt", scene.batch, scene.seed)
    if answer.error is not None:
        raise ValueError(f"bench.inputs={scene.inputs}: {answer.error}")
    found: Any = answer.value
    jobs = []
    for pattern, (batch, heads, _, head_dim) in found["shapes"].items():
        own = replace(scene, batch=batch, heads=heads, head_dim=head_dim, inputs=str(folder / "inputs.pt"))
        size = f"{batch} examples, {heads} heads of {head_dim} in all layers, {found['lengths'][pattern]} tokens"
        print(f"recorded {pattern}: {size}", flush=True)
        jobs += [(job, own) for job in attention_jobs(cfg, conf, own, found) if job.pattern == pattern]
    return jobs


def _measured(jobs: Sequence[tuple[Job, Scene]]) -> Iterator[dict[str, Any]]:
    """Measure one row after another, and print it; a contender that fails its check is not timed."""
    whole = sum(_effort(job) for job, _ in jobs)
    done, start = 0, time.monotonic()
    wrong: dict[tuple[Any, ...], str | None] = {}
    with Worker() as checker:
        for job, scene in jobs:
            key = job.checked_as
            if job.target is not None and key not in wrong:
                longest = max(other.n for other, _ in jobs if other.checked_as == key)
                answer = checker.ask(measure.checked, replace(job, n=longest), scene)
                wrong[key] = answer.value or answer.error
            if wrong.get(key) is not None:
                record = record_of(job, scene, {}, "FAIL", str(wrong[key]))
            else:
                record = _row(job, scene)
            done += _effort(job)
            left = (time.monotonic() - start) * (whole - done) / done
            print(line(record, done / whole, time.strftime("%H:%M:%S", time.gmtime(left))), flush=True)
            yield record


def _row(job: Job, scene: Scene) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    answer = alone(MEASURES.get(job.model, steps.measured), job, scene)
    if answer.error is not None:
        return record_of(job, scene, {}, "error", answer.error)
    row = dict(answer.value)
    if scene.memory and "peak_mb" not in row and job.model == "attention":
        peaks = {name: alone(measure.peak, job, scene, name != "peak_mb") for name in ("peak_mb", "dense_peak_mb")}
        row |= {name: peak.value for name, peak in peaks.items()}
    own = {key: row.pop(key) for key in ("heads", "head_dim", "batch") if key in row}
    return record_of(job, replace(scene, **own), row, "ok", _notes(answer))


def _drawn(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw what there is to draw; return the names of the files."""
    shown = panels(records)
    if not shown:
        return []
    draw(folder / "bench.png", shown)
    try:
        page(folder / "bench.html", records, shown)
    except ModuleNotFoundError as error:
        print(error)
        return ["bench.png"]
    return ["bench.png", "bench.html"]


def _notes(answer: Answer) -> str:
    return "; ".join(answer.warnings[:3])


def _effort(job: Job) -> int:
    """Return about how long a row takes, in an unit of its own: to begin a process, and to attend to pairs."""
    return BEGINNING**2 + (job.n if job.model == "decode" else job.n**2)


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask for an end into an exception, so that what was measured is still shown."""

    def end(number: int, _: object) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain(node: Any) -> list[Mapping[str, Any]]:
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return plain
