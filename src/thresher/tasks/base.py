"""The training step of every task: meters compute, adds the budget to the loss, logs, refuses NaN and infinity."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric

from thresher.attention.mechanism import Mechanism
from thresher.attention.options import check_number
from thresher.attention.registry import name_of
from thresher.attention.shared.offsets import find_trainable_offsets, named_offsets
from thresher.budget.auxiliary import choose_weights, sum_losses
from thresher.budget.budgets import Budget
from thresher.budget.meter import ComputeMeter
from thresher.budget.ratio import ComputeRatio
from thresher.tasks.distillation import measure_divergence, predict_densely
from thresher.tasks.finite import NonFiniteError, all_finite, find_bad_gradients, find_bad_layer, walk_tensors
from thresher.tasks.seeding import seed_generators

NonFinite = Literal["stop", "skip"]
GRADIENT_LOG_EVERY = 10  # steps between measurements of the thresholds' gradients


def name_attention(net: nn.Module) -> str:
    """Name the mechanisms of a network."""
    return ", ".join(sorted({name_of(type(m)) for m in net.modules() if isinstance(m, Mechanism)}))


class Step(NamedTuple):
    """The loss and the predictions of one batch."""

    loss: Tensor  # mean over the batch
    size: int  # number of examples
    predictions: Tensor
    targets: Tensor
    counted: Tensor | None = None  # which predictions count; None is all


class Task(pl.LightningModule, ABC):
    """Trains a network under a compute budget. A subclass defines the loss and the metrics.

    Args:
        net: The network, with its mechanisms mounted.
        optimizer: Builds the optimiser for a network.
        scheduler: Builds the schedule of the learning rates for an optimiser and a number of steps.
        budget: The bound or the price of compute.
        seed: Of all random numbers in training.
        clip: Largest gradient norm, of the weights and of the thresholds separately, so that neither shrinks the
            other. None does not clip.
        nonfinite: At a NaN or infinite loss or gradient, "stop" the training, or "skip" the step, which then changes
            only the schedules. Either waits for one value from the device in each optimiser step; None checks nothing.
        distill: Weight of the divergence of predictions from those under dense attention, see `distillation.py`.
        auxiliary: Weights of auxiliary losses by name; those left out have the weight that their mechanism states.

    Attributes:
        metric: Name of the metric that measures the quality of the network, for example "acc".
        attention: Names of the mechanisms in the network.
        fixed_ratio: Share of dense MACs that selection costs, known after the first step.
    """

    metric: str

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[..., Any],
        budget: Budget,
        seed: int,
        clip: float | None = 1.0,
        nonfinite: NonFinite | None = "stop",
        distill: float = 0.0,
        auxiliary: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if nonfinite not in (None, *get_args(NonFinite)):
            raise ValueError(f"task.nonfinite must be one of {', '.join(get_args(NonFinite))}, null, got {nonfinite!r}")
        if clip is not None:  # None does not clip
            check_number("task.clip", clip, above=0.0)
        check_number("task.distill", distill, least=0.0)
        self.net = net
        self.meter = ComputeMeter(net)
        self.auxiliary = choose_weights(self.meter.weights, auxiliary, "task.auxiliary")
        self.budget = budget
        self.attention = name_attention(net)
        self.fixed_ratio = 0.0
        self.seed = seed
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._clip, self._nonfinite, self._distill = clip, nonfinite, distill
        self._skipped = False
        self._losses: list[tuple[Tensor, Any, int]] = []  # since the last optimiser step: loss, batch and its number
        self._settled = False
        self._compute_gradient: list[Tensor] = []
        self._pulls: dict[str, float | Tensor] = {}
        self._values: dict[str, float | Tensor] = {}  # values of the last step, to log
        self.evaluation = nn.ModuleDict({stage: self._build_all_metrics(stage) for stage in ("val", "test")})

    @abstractmethod
    def step(self, batch: Any) -> Step:
        """Run the network on a batch."""

    @abstractmethod
    def build_metrics(self, stage: str) -> dict[str, Metric]:
        """Build the metrics of an evaluation, `self.metric` among them; each takes predictions and targets."""

    def _build_all_metrics(self, stage: str) -> nn.ModuleDict:
        shared: dict[str, Metric] = {
            "loss": MeanMetric(),
            "kept": ComputeRatio("kept"),
            "compute": ComputeRatio("macs"),
        }
        return nn.ModuleDict(shared | self.build_metrics(stage))

    # Training

    def configure_model(self) -> None:
        """Shard the network if the strategy does; thresholds stay whole in each process."""
        if self.device_mesh is not None:
            from thresher.tasks.sharding import shard_network

            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            if any(isinstance(callback, WeightAveraging) for callback in callbacks):
                raise ValueError("callbacks=ema averages whole weights, not sharded ones: use trainer=ddp with it")
            whole = [each.offset for _, each in named_offsets(self.net)]
            shard_network(self.net, self.device_mesh["data_parallel"], whole)

    def on_fit_start(self) -> None:
        if self._distill and self.attention == "dense":
            raise ValueError("task.distill has no effect with attention=dense, its own dense output: leave it out")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed all generators by seed, step, micro-batch and process alone."""
        seed_generators(self._format_key(batch_idx))

    def _format_key(self, batch_idx: int) -> str:
        return f"{self.seed}/{self.global_step}/{batch_idx}/{self.global_rank}"

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        seed_generators(f"{self.seed}/evaluation/{batch_idx}/{self.global_rank}")

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        seed_generators(f"{self.seed}/evaluation/{batch_idx}/{self.global_rank}")

    @property
    def progress(self) -> float:
        """Finished share of the training steps."""
        return min(self.global_step / self.total_steps, 1.0)

    @property
    def total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total in (float("inf"), -1):
            raise ValueError("budgets and schedules need a known length: set trainer.max_epochs or trainer.max_steps")
        return max(int(total), 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        progress = self.progress
        dense = predict_densely(self.net, lambda x: self.step(x).predictions, batch) if self._distill else None
        with self.meter:
            step = self.step(batch)
        ratio = self.meter.ratio(self.budget.quantity)
        if not self._settled:
            self._settled = True
            rank_zero_info(self.budget.settle(ratio, self.attention))
            self.fixed_ratio = self.meter.fixed_ratio()
            self._refuse_unreachable_bound()
        compute_loss = self.budget.loss(ratio, progress)
        self._last_ratio = ratio.detach()
        self._store_compute_gradient(compute_loss)
        aim = self.budget.aim(progress)
        self._values = {
            "train/loss": step.loss.detach(),
            "train/compute_loss": compute_loss.detach(),
            "train/kept": self.meter.kept().detach(),
            "train/compute": self.meter.ratio("macs").detach(),
        }
        if aim is not None:
            self._values |= {"train/aim": aim, "train/gap": ratio.detach() - aim}
        with torch.no_grad():
            self._values |= {f"train/{name}": value for name, value in self.training_metrics(step).items()}
        losses = self.meter.losses()
        self._values |= {f"train/auxiliary/{name}": value.detach() for name, value in losses.items()}
        loss = step.loss + compute_loss + sum_losses(losses, self.auxiliary)
        if dense is not None:
            divergence = measure_divergence(step.predictions, dense, step.counted)
            self._values["train/distill"] = divergence.detach()
            loss = loss + self._distill * divergence
        self._losses.append((loss.detach(), batch, batch_idx))
        return loss

    def _explain_loss(self, loss: Tensor, batch: Any, batch_idx: int) -> str:
        """Explain a loss that is not finite: its batch, and the first layer with such an output."""
        seed_generators(self._format_key(batch_idx))
        layer = find_bad_layer(self.net, lambda: self.step(batch))
        where = f"first in the output of {layer}" if layer else "while all layers were finite"
        if not all(map(all_finite, walk_tensors(batch))):
            where += "; the batch itself holds values that are not"
        return f"the loss is {float(loss)} in batch {batch_idx} of epoch {self.current_epoch}, {where}"

    def _report_nonfinite(self, reason: str) -> None:
        """Raise or warn, as `nonfinite` asks."""
        step = f"step {self.global_step}"
        if self._nonfinite == "stop":
            raise NonFiniteError(
                f"{step}: {reason}. The weights are unchanged, and checkpoints hold finite ones. Lower "
                "optimizer.lr, choose another trainer.precision, or skip such steps by task.nonfinite=skip"
            )
        rank_zero_warn(f"{step}: {reason}; the step is skipped")

    def weight(self, step: Step) -> float | Tensor:
        """Weigh the loss of a batch in the mean of an evaluation."""
        return step.size

    def training_metrics(self, step: Step) -> dict[str, Tensor]:
        """Compute further metrics of a training batch to log."""
        return {}

    def on_train_batch_end(self, *_: Any) -> None:
        if self.ends_step() and not self._skipped:
            self.budget.update(self._last_ratio, self.progress)
        self._log_values()

    def _log_values(self) -> None:
        """Log the values of a step only when a logger or the end of an epoch needs them, as each call is slow.

        Lightning's progress bar gets none of them: it would read each value from the device in every step.
        """
        trainer, is_last = self.trainer, self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every and self.ends_step() and self.global_step % every == 0
        if is_due or is_last or trainer.should_stop or self.global_step == trainer.max_steps:
            self.log_dict(self._values)

    def ends_step(self) -> bool:
        """Tell whether the batch that just ended was the last to accumulate into an optimiser step."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress
        return batches.is_last_batch or batches.current.ready % self.trainer.accumulate_grad_batches == 0

    def _refuse_unreachable_bound(self) -> None:
        bound, fixed = self.budget.bound, self.fixed_ratio
        if bound is not None and self.budget.quantity == "macs" and bound <= fixed:
            raise ValueError(
                f"compute.target={bound:g} of dense macs is out of reach: selection alone costs {fixed:.3g}. "
                f"Choose a target above that, fewer attention.estimate.bits, or compute.quantity=kept"
            )

    # Gradients

    def _store_compute_gradient(self, compute_loss: Tensor) -> None:
        """Store the gradient of the compute loss at the thresholds, call by call.

        Each call is differentiated on its own. A walk through the whole network would find nothing more, as scores get
        no gradient of compute, and would need weights that sharded training has freed after the forward.
        """
        thresholds = find_trainable_offsets(self.net)
        calls = [(name, cost.kept) for name, cost in self.meter.calls if name in thresholds and cost.kept.requires_grad]
        if not calls or not compute_loss.requires_grad or self.global_step % GRADIENT_LOG_EVERY:
            return
        scaled = compute_loss / self.trainer.accumulate_grad_batches
        pulls = torch.autograd.grad(scaled, [kept for _, kept in calls], retain_graph=True, allow_unused=True)
        stored = {name: torch.zeros_like(offset) for name, offset in thresholds.items()}
        for (name, kept), pull in zip(calls, pulls, strict=True):
            if pull is not None:
                (own,) = torch.autograd.grad(kept, thresholds[name], pull, retain_graph=True)
                stored[name] = stored[name] + own
        self._compute_gradient.append(torch.cat(list(stored.values())))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norms of the task and of the budget at the thresholds."""
        thresholds = list(find_trainable_offsets(self.net).values())
        if self.device_mesh is not None:
            from thresher.tasks.sharding import average_gradients

            average_gradients(thresholds)
        if thresholds and self.global_step % GRADIENT_LOG_EVERY == 0:
            self._pulls = self._measure_pulls(thresholds)
        self._values |= {f"thresholds/{name}_gradient": norm for name, norm in self._pulls.items()}

    def _measure_pulls(self, thresholds: list[nn.Parameter]) -> dict[str, float | Tensor]:
        total = torch.cat([torch.zeros_like(t) if t.grad is None else t.grad for t in thresholds])
        compute = sum(self._compute_gradient, torch.zeros_like(total))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(compute)
            compute = compute / torch.distributed.get_world_size()
        self._compute_gradient = []
        return {"task": (total - compute).norm(), "compute": compute.norm()}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val is not None:
            raise ValueError("set task.clip instead of trainer.gradient_clip_val: thresholds are clipped separately")
        groups = [
            [p for g in optimizer.param_groups if g["name"] in names for p in g["params"] if p.grad is not None]
            for names in (("decay", "no_decay"), ("thresholds",))
        ]
        groups = [group for group in groups if group]
        norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        self._skipped = False
        if self._nonfinite is not None:
            self._check_finite(optimizer, norms)
        self._losses = []
        if self._clip is not None and not self._skipped:
            for group, norm in zip(groups, norms, strict=True):
                nn.utils.clip_grads_with_norm_(group, self._clip, norm)

    def _check_finite(self, optimizer: Optimizer, norms: list[Tensor]) -> None:
        """Check that the losses and the gradients of this step are finite; skip the step if not."""
        finite = torch.stack([all_finite(x) for x in (*(loss for loss, _, _ in self._losses), *norms)])
        if finite.all():  # the only value that a training step reads from its device
            return
        for loss, batch, batch_idx in self._losses:
            if not all_finite(loss):
                self._report_nonfinite(self._explain_loss(loss, batch, batch_idx))
        scaler = getattr(self._trainer and self._trainer.precision_plugin, "scaler", None)
        # The fp16 scaler expects infinities, and skips such steps itself.
        self._skipped = scaler is None and not all(map(all_finite, norms))
        if self._skipped:
            self._skip_step(optimizer)

    def _skip_step(self, optimizer: Optimizer) -> None:
        bad = find_bad_gradients(self.net.named_parameters())
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        batch = self.trainer.fit_loop.batch_idx
        self._report_nonfinite(
            f"the gradient of {bad[-1] if bad else 'all parameters together'}{more} is not finite after batch {batch} "
            f"of epoch {self.current_epoch}"
        )
        optimizer.zero_grad(set_to_none=True)

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.net)
        scheduler = self._make_scheduler(optimizer, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation

    def _evaluate(self, stage: str, batch: Any) -> None:
        with self.meter:
            step = self.step(batch)
        metrics: dict[str, Any] = dict(self.evaluation[stage].items())  # type: ignore[operator]
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(step.loss, weight=self.weight(step))
            elif isinstance(metric, ComputeRatio):
                metric.update(self.meter.costs())
            else:
                metric.update(step.predictions, step.targets)
            self.log(f"{stage}/{name}", metric, batch_size=step.size)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log val/score: exp(-loss) if the budget holds, else minus the excess, which is below any exp(-loss).

        The score chooses checkpoints. Without the budget the best epoch would be one of the dense warm-up, and
        accuracy on a small validation set is too coarse: it chose among the last epochs at random.
        """
        metrics: Any = self.evaluation["val"]
        score = torch.exp(-metrics["loss"].compute())
        if self.budget.bound is not None:
            ratio = metrics["kept" if self.budget.quantity == "kept" else "compute"].compute()
            score = torch.where(ratio <= self.budget.bound, score, self.budget.bound - ratio)
        self.log("val/score", score.float(), sync_dist=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settled"] = {
            "done": self._settled,
            "fixed_ratio": self.fixed_ratio,
            "bounded": self.budget.bound is not None,
            "pulls": {name: float(norm) for name, norm in self._pulls.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the decisions of the first step, which calibration needs before the next one."""
        settled = checkpoint.get("settled")
        if settled is not None and settled["done"]:
            self._settled, self.fixed_ratio = True, settled["fixed_ratio"]
            self._pulls = settled["pulls"]
            if not settled["bounded"]:
                self.budget.release()
