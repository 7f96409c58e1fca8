"""The cost of the toolkit itself: hosts around dense attention, data, statistics and logs.

Hosts      training steps of a model of timm or transformers, as it is and with `attention=dense` mounted, in turns.
Data       the time that a training step waits for its batch.
Logs       the share of a training step spent in metrics, logs and callbacks that only read.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.hosts import sparsify
from thresher.tools.bench.jobs import Scene
from thresher.tools.bench.plain import PLAIN
from thresher.tools.bench.timing import Clock, compute_spread, time_interleaved
from thresher.tools.bench.worker import run_in_process

HOST_LIMIT, LOG_LIMIT = 1.05, 0.02
WAITING = "[_TrainingEpochLoop].train_dataloader_next"
STEP = "run_training_batch"
LOOKING = (
    "WatchThresholds",
    "HeadStatistics",
    "LearningRateMonitor",
    "Progress",
    "Checkpoint",
)  # callbacks that only look


def measure_overhead(cfg: DictConfig, conf: Path, scene: Scene, folder: Path) -> None:
    """Measure and print every cost, and write `overhead.json`."""
    results: list[dict[str, Any]] = []
    parts: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(measure_host, (name, scene)) for name in PLAIN]
    given: Any = OmegaConf.to_container(cfg.overhead)
    parts.append((measure_job, (conf, folder / "job", given["steps"], given["overrides"], scene)))
    for function, arguments in parts:
        answer = run_in_process(function, *arguments)
        found = answer.value or [{"what": f"{function.__name__} {arguments[0]}", "value": None, "note": answer.error}]
        results += found
        for result in found:
            print(f"{result['what']}: {_format(result)}", flush=True)
        (folder / "overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title="overhead", title_justify="left")
    for head in ("what", "value", "limit", "measured on"):
        table.add_column(head)
    for result in results:
        table.add_row(result["what"], _format(result), str(result.get("limit", "")), result.get("note") or "")
    Console(width=140).print(table)


def measure_host(name: str, scene: Scene) -> list[dict[str, Any]]:
    """Time training steps of a plain model and of the same one with dense attention mounted."""
    if scene.threads is not None:
        torch.set_num_threads(scene.threads)
    try:
        make = PLAIN[name]
        torch.manual_seed(scene.seed)
        plain, batch, note = make()
        torch.manual_seed(scene.seed)
        mounted, _, _ = make()
    except ImportError as error:
        return [{"what": f"step with attention=dense / plain {name}", "value": None, "note": f"needs {error.name}"}]
    sparsify(mounted, "dense")
    clock = Clock(scene.device)
    nets = {who: net.to(scene.device).train() for who, net in (("plain", plain), ("mounted", mounted))}
    batch = {key: x.to(scene.device) for key, x in batch.items()}
    optimizers = {who: torch.optim.AdamW(net.parameters(), lr=1e-5) for who, net in nets.items()}

    def step(who: str) -> Sequence[float]:
        start = clock.now()
        compute_loss(nets[who], batch).backward()
        optimizers[who].step()
        optimizers[who].zero_grad()
        return (clock.now() - start,)

    recorded = time_interleaved({who: partial(step, who) for who in nets}, scene.repetitions, scene.seconds)
    times = {who: [x for (x,) in each] for who, each in recorded.items()}
    # The ratio of each pair of neighbours: what slows the machine for a while slows both.
    ratios = compute_spread([a / b / 1000 for a, b in zip(times["mounted"], times["plain"], strict=True)])
    return [
        {
            "what": f"step with attention=dense / plain {name}",
            "value": ratios.median,
            "low": ratios.low,
            "high": ratios.high,
            "limit": f"<= {HOST_LIMIT}",
            "plain_ms": compute_spread(times["plain"]).median,
            "note": note,
        }
    ]


def compute_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute a loss over the logits of a model."""
    target = batch["target"]
    inputs = {key: x for key, x in batch.items() if key != "target"}
    out = net(**inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def measure_job(conf: Path, folder: Path, steps: int, given: Sequence[str], scene: Scene) -> list[dict[str, Any]]:
    """Train the default experiment for some steps, and measure where their time goes."""
    import pytorch_lightning as pl
    from pytorch_lightning.profilers import SimpleProfiler

    from thresher.config.overrides import compose_config
    from thresher.run.build import build, build_data, build_task, quiet_lightning

    if scene.threads is not None:
        torch.set_num_threads(scene.threads)
    quiet_lightning()
    cfg = compose_config(conf, "train", ["run.name=overhead", f"run.dir='{folder}'", *given])
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    task = build_task(cfg, data)
    profiler = SimpleProfiler(dirpath=folder, filename="times")
    callbacks = [build(node) for name, node in (cfg.callbacks or {}).items() if "checkpoint" not in str(name)]
    loggers = [build(logger) for logger in (cfg.logger or {}).values()]
    trainer: pl.Trainer = build(cfg.trainer)(
        logger=loggers,
        callbacks=callbacks,
        profiler=profiler,
        default_root_dir=str(folder),
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with _profile_methods(
        profiler,
        [(task, "log"), (task, "training_metrics"), (task.meter, "kept"), *((x, "log_metrics") for x in loggers)],
    ):
        trainer.fit(task, datamodule=data)
    spent = {name: sum(each[1:]) for name, each in profiler.recorded_durations.items()}  # the first step settles things
    waited, step = spent[WAITING], spent[STEP]
    named = {name: x for name, x in spent.items() if "train_batch" in name and any(word in name for word in LOOKING)}
    named |= {name: x for name, x in spent.items() if name.startswith(TIMED)}
    looking = sum(named.values())
    whole = (
        step + waited + sum(x for name, x in spent.items() if name.startswith("[Callback]") and "train_batch" in name)
    )
    note = f"{cfg.run.name}, {data.batch_size} examples, {1000 * whole / (steps - 1):.0f} ms a step, {steps - 1} steps"
    largest = sorted(named.items(), key=lambda item: -item[1])[:3]
    where = ", ".join(f"{name.removeprefix(TIMED)} {100 * x / whole:.2f} %" for name, x in largest)
    return [
        {"what": "waiting for data / step", "value": waited / whole, "limit": "< 0.5", "note": note},
        {"what": "statistics and logs / step", "value": looking / whole, "limit": f"< {LOG_LIMIT}", "note": where},
    ]


TIMED = "timed "


@contextmanager
def _profile_methods(profiler: Any, methods: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """Let a profiler record the time of some methods, while it is entered."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in methods]

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with profiler.profile(name):
                return original(*arguments, **keywords)

        return call

    for owner, name, original in originals:
        object.__setattr__(owner, name, wrapped(f"{TIMED}{type(owner).__name__}.{name}", original))
    try:
        yield
    finally:
        for owner, name, _ in originals:
            object.__delattr__(owner, name)


def _format(result: dict[str, Any]) -> str:
    value = result["value"]
    if value is None:
        return f"not measured: {result.get('note')}"
    return f"{value:.3f}" + (f" ({result['low']:.3f} to {result['high']:.3f})" if "low" in result else "")
