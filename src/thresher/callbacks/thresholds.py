"""Calibrate thresholds to the budget during training, anneal their surrogate, and warn of failures."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from thresher.attention.options import check_flags, check_integer, check_number
from thresher.attention.shared.offsets import find_trainable_offsets
from thresher.attention.shared.thresholds import named_thresholds
from thresher.budget.calibration import ThresholdProbe, calibrate, evaluation_mode, is_noisy
from thresher.tasks.base import Task

QUIET_PASSES = 4  # passes without dropout in each window of calibration


class CalibrateThresholds(pl.Callback):
    """Set every head's base threshold by quantiles of its score differences.

    If the budget has a target, the base follows it: each training step moves it towards the quantile that keeps the
    share of the budget's aim. Each head then starts from its own scale, the annealing is stable, and the trained
    offsets only learn which heads deserve more. If the network has dropout, the base for evaluation follows the aim in
    passes without dropout, four in each window. Without a target, `initial` sets the base once, before training; leave
    it null for a network trained from scratch, whose scores do not differ yet.

    Thresholds that are `given`, such as a tuning's, stay as they are at first. What they keep all together is measured
    before training, and the quantile of each head that keeps that share becomes its base; its offset becomes the
    distance of its threshold from there. So the base follows the budget from where the thresholds stand, and offsets
    hold how much more or less each head keeps.

    Args:
        window: Share of the training steps over which quantiles are averaged.
        examples: Number of examples read of a batch.
        pairs: Number of pairs read of a head in a step; of longer sequences, those of random queries.
        given: Whether thresholds are given.
        initial: Share of the visible pairs to keep when there is no target, or None.
        batches: Training batches read for `given` or `initial`.

    Raises:
        ValueError: A value is out of range, or thresholds are given and there is an `initial` share.
    """

    def __init__(
        self,
        window: float = 0.01,
        examples: int = 16,
        pairs: int = 2**18,
        given: bool = False,
        initial: float | None = None,
        batches: int = 8,
    ) -> None:
        check_flags(**{"callbacks.calibrate.given": given})
        check_number("callbacks.calibrate.window", window, least=0.0)
        if window > 1:
            raise ValueError(f"callbacks.calibrate.window is a share of the training steps, at most 1; got {window}")
        if initial is not None:
            check_number("callbacks.calibrate.initial", initial, above=0.0)
            if initial > 1:
                raise ValueError(f"callbacks.calibrate.initial is a share of the pairs, at most 1; got {initial}")
            if given:
                raise ValueError(
                    f"callbacks.calibrate.initial={initial:g} sets thresholds anew, and init_mechanisms=true takes "
                    "those of init_from: leave one out"
                )
        for name, number in (("examples", examples), ("pairs", pairs), ("batches", batches)):
            check_integer(f"callbacks.calibrate.{name}", number, 1)
        self.window = window
        self.examples = examples
        self.pairs = pairs
        self.given = given
        self.initial = initial
        self.batches = batches
        self._probe: ThresholdProbe | None = None
        self._begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Task)
        if stage == "fit" and dict(named_thresholds(pl_module.net)) and pl_module.budget.bound is not None:
            self._probe = ThresholdProbe(pl_module.net, self.examples, self.pairs)
            pl_module.budget.hold_by_calibration()

    def state_dict(self) -> dict[str, Any]:
        """Store whether the base has left its initial value."""
        return {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether the base has left its initial value."""
        self._begun = state_dict["begun"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if self.given and self._probe and not self._begun:
            self._start_from_given(trainer, pl_module)
        if self.initial is None or self._probe or trainer.global_step or not dict(named_thresholds(pl_module.net)):
            return
        batches = self._read_batches(trainer, pl_module)
        with trainer.precision_plugin.forward_context():
            calibrate(pl_module.net, batches, self.initial, forward=pl_module.step)
            if is_noisy(pl_module.net):
                bases = {name: t.base.clone() for name, t in named_thresholds(pl_module.net)}
                with evaluation_mode(pl_module.net):
                    calibrate(pl_module.net, batches, self.initial, forward=pl_module.step)
                for name, thresholds in named_thresholds(pl_module.net):
                    thresholds.base.copy_(bases[name])
        rank_zero_info(f"thresholds calibrated on {len(batches)} batches to keep {self.initial:g} of the visible pairs")

    def _read_batches(self, trainer: pl.Trainer, task: Task) -> list[Any]:
        loader: Any = trainer.train_dataloader
        return [
            task.transfer_batch_to_device(batch, task.device, 0)
            for batch in itertools.islice(iter(loader), self.batches)
        ]

    @torch.no_grad()
    def _start_from_given(self, trainer: pl.Trainer, task: Task) -> None:
        """Set bases to the quantiles at what given thresholds keep together, and offsets to what is left of these."""
        assert self._probe is not None
        batches = self._read_batches(trainer, task)
        with trainer.precision_plugin.forward_context():
            with evaluation_mode(task.net):
                kept = self._measure_kept(task, batches)
                quiet = self._read_quantiles(task, batches, kept)
            noisy = self._read_quantiles(task, batches, kept) if is_noisy(task.net) else quiet
        for name, thresholds in self._probe.thresholds.items():
            given = thresholds.eval_base + thresholds.offset
            left = torch.where(given.isfinite(), given - quiet[name], thresholds.offset)
            thresholds.offset.copy_(torch.where(quiet[name].isfinite(), left, thresholds.offset))
            for base, found in ((thresholds.base, noisy[name]), (thresholds.eval_base, quiet[name])):
                base.copy_(torch.where(found.isfinite(), found, base))
        self._begun = True
        rank_zero_info(f"training begins with given thresholds, which keep {kept:.3g} of the visible pairs")

    @staticmethod
    def _measure_kept(task: Task, batches: Sequence[Any]) -> float:
        shares = []
        for batch in batches:
            with task.meter:
                task.step(batch)
            shares.append(float(task.meter.kept()))
        return sum(shares) / len(shares)

    def _read_quantiles(self, task: Task, batches: Sequence[Any], kept: float) -> dict[str, torch.Tensor]:
        assert self._probe is not None
        self._probe.level = kept
        for batch in batches:
            task.step(batch)
        self._probe.level = None
        return self._probe.collect()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Task)
        if self._probe:
            self._probe.level = self._compute_level(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        if self._probe is None:
            return
        level, self._probe.level = self._probe.level, None
        if not pl_module.ends_step():
            return
        window = max(self.window * pl_module.total_steps, 1.0)
        every = max(round(window / QUIET_PASSES), 1)
        self._probe.move_bases("base", 1 / window if self._begun else 1.0)
        if not is_noisy(pl_module.net):
            for thresholds in self._probe.thresholds.values():
                thresholds.eval_base.copy_(thresholds.base)
        elif not self._begun or trainer.global_step % every == 0:
            self._probe.level = level
            with evaluation_mode(pl_module.net), trainer.precision_plugin.forward_context():
                pl_module.step(batch)
            self._probe.level = None
            self._probe.move_bases("eval_base", every / window if self._begun else 1.0)
        self._begun = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._probe:
            self._probe.remove()
            self._probe = None

    @staticmethod
    def _compute_level(task: Task) -> float | None:
        """Compute the share of pairs to keep that meets the budget's aim."""
        aim = task.budget.aim(task.progress)
        if aim is None or task.budget.quantity == "kept":
            return aim
        return max((aim - task.fixed_ratio) / (1 - task.fixed_ratio), 0.0)


class AnnealTemperature(pl.Callback):
    """Narrow the surrogate of every threshold geometrically over training.

    Args:
        end: Final share of each tau, at the last step; 1 does not anneal.
    """

    def __init__(self, end: float = 1.0) -> None:
        check_number("callbacks.temperature.end", end, above=0.0)
        self.end = end
        self._start: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not self._start:
            self._start = {name: t.tau.clone() for name, t in named_thresholds(pl_module.net)}

    def state_dict(self) -> dict[str, Any]:
        """Store the widths at the start of the training."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the widths at the start of the training."""
        self._start = state_dict["start"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Task)
        if self.end == 1:
            return
        for name, thresholds in named_thresholds(pl_module.net):
            thresholds.tau.copy_(self._start[name].to(thresholds.tau.device) * self.end**pl_module.progress)


class WatchThresholds(pl.Callback):
    """Warn once when trained thresholds have not moved, and once when they have collapsed.

    Args:
        moved: Offsets count as not moved if all are within this distance of their start after half of the
            training.
        collapsed: Share of heads at threshold zero (only the best key is kept) that counts as collapse.
    """

    def __init__(self, moved: float = 1e-3, collapsed: float = 0.5) -> None:
        check_number("callbacks.watch.moved", moved, least=0.0)
        check_number("callbacks.watch.collapsed", collapsed, above=0.0)
        if collapsed > 1:
            raise ValueError(f"callbacks.watch.collapsed is a share of the heads, at most 1; got {collapsed}")
        self.moved = moved
        self.collapsed = collapsed
        self._start: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not self._start:
            self._start = {name: p.detach().clone() for name, p in find_trainable_offsets(pl_module.net).items()}

    def state_dict(self) -> dict[str, Any]:
        """Store the thresholds at the start of the training, and the warnings given."""
        return {"start": self._start, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the thresholds at the start of the training, and the warnings given."""
        self._start = state_dict["start"]
        self._warned = set(state_dict["warned"])

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not self._start:
            return
        now = find_trainable_offsets(pl_module.net)
        farthest = max(
            float((now[name] - start.to(now[name].device)).abs().max()) for name, start in self._start.items()
        )
        values = [thresholds.values() for _, thresholds in named_thresholds(pl_module.net)]
        at_zero = float((torch.cat(values) <= 0).float().mean()) if values else 0.0
        pl_module.log("thresholds/moved", farthest, sync_dist=True)
        pl_module.log("thresholds/at_zero", at_zero, sync_dist=True)
        if pl_module.progress >= 0.5 and farthest < self.moved:
            self._warn(
                "moved",
                f"trained thresholds have moved by {farthest:.1e} at most in half of the training: they receive "
                "no gradient. Raise optimizer.threshold_lr or attention.gate.tau, or set callbacks.calibrate.initial",
            )
        if at_zero >= self.collapsed:
            self._warn(
                "collapsed",
                f"{at_zero:.0%} of the heads have threshold 0 and keep only their best key. Lower compute.weight or "
                "optimizer.threshold_lr, anneal longer (compute.end), or raise the target",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)
