"""Train thresholds under a compute budget with the Trainer of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thresher.attention.shared.tail import Tail
from thresher.attention.shared.thresholds import named_thresholds
from thresher.budget.auxiliary import choose_weights, sum_losses
from thresher.budget.budgets import Target
from thresher.budget.calibration import ThresholdProbe
from thresher.budget.meter import ComputeMeter
from thresher.hosts.saving import save_adapter

ADAPTER, STATE = "adapter", "sparse_callback.pt"
WINDOW = 0.01  # share of the steps over which thresholds follow the quantiles of their heads


class SparseCallback(TrainerCallback):
    """Holds a model to a compute budget while the Trainer of transformers trains it.

    The budget is annealed from dense to `target`. Each head's threshold follows the quantile that keeps the share of
    the moment, and is trained around it; the callback owns the optimiser of thresholds and tail factors, because they
    need learning rates of their own. It adds the compute loss and the auxiliary losses of mechanisms to the loss of the
    model, logs `kept`, `kept_aim` and each of these losses, and saves an adapter in each checkpoint. A Trainer that
    resumes from a checkpoint continues as it would have.

    Args:
        target: Share of the visible pairs to keep at the end, in (0, 1].
        weight: Weight of the squared distance to the target of the moment.
        start: Share of the steps before the target leaves 1.
        end: Share of the steps after which it stays.
        margin: Share of the target by which training aims below it.
        threshold_lr: Learning rate of thresholds and tail factors.
        auxiliary: Weights of auxiliary losses by name; those left out have the weight that their mechanism states.

    Raises:
        ValueError: A value is out of range; the model has no trainable thresholds, or does not compute its loss itself.
    """

    def __init__(
        self,
        target: float,
        *,
        weight: float = 10.0,
        start: float = 0.1,
        end: float = 0.6,
        margin: float = 0.04,
        threshold_lr: float = 3e-3,
        auxiliary: Mapping[str, float] | None = None,
    ) -> None:
        self._budget = Target(target, weight, start, end, margin=margin)
        self._threshold_lr, self._auxiliary = threshold_lr, auxiliary
        self._handles: list[Any] = []
        self._values: dict[str, float | Tensor] = {}
        self._meters: dict[nn.Module, ComputeMeter] = {}  # a meter's hooks stay in its model
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the costs of the model from now on; continue from the checkpoint that the Trainer resumes from."""
        model: nn.Module = kwargs["model"]
        thresholds = [each for _, each in named_thresholds(model) if each.offset.requires_grad]
        if not thresholds:
            raise ValueError(
                f"{type(model).__name__} has no trainable thresholds: call sparsify(model, 'latte') before the Trainer"
            )
        own = [each.offset for each in thresholds]
        own += [each.factor for each in model.modules() if isinstance(each, Tail)]
        self._optimizer = torch.optim.Adam(own, lr=self._threshold_lr, betas=(0.5, 0.999))
        self._args, self._state = args, state
        self._meter = self._meters.get(model) or self._meters.setdefault(model, ComputeMeter(model))
        self._weights = choose_weights(self._meter.weights, self._auxiliary)
        self._probe = ThresholdProbe(model)
        saved = _find_folder(args, state) / STATE
        if state.global_step and saved.is_file():
            stored = torch.load(saved, map_location=own[0].device, weights_only=True)
            self._optimizer.load_state_dict(stored["optimizer"])
            self._begun = stored["begun"]
        self._handles = [
            model.register_forward_pre_hook(self._begin_forward),
            model.register_forward_hook(self._end_forward, with_kwargs=True),
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step thresholds and tail factors, and hide their gradients from the optimiser of the Trainer."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move each head's threshold towards the quantile that keeps the share of the moment."""
        share = 1 / max(WINDOW * state.max_steps, 1.0) if self._begun else 1.0
        self._probe.move_bases("base", share)
        for thresholds in self._probe.thresholds.values():
            thresholds.eval_base.copy_(thresholds.base)
        self._begun = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the share kept, and the share aimed at, to what is logged."""
        if logs is not None and "loss" in logs:
            values = {name: float(value) for name, value in self._values.items()}
            logs |= values
            if state.log_history:
                state.log_history[-1] |= values

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save an adapter, and the state of this callback, beside the checkpoint."""
        if state.is_world_process_zero:
            folder = _find_folder(args, state)
            save_adapter(kwargs["model"], folder / ADAPTER)
            torch.save({"optimizer": self._optimizer.state_dict(), "begun": self._begun}, folder / STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model."""
        for handle in self._handles:
            handle.remove()
        self._probe.remove()
        self._handles = []

    @property
    def _progress(self) -> float:
        return self._state.global_step / max(self._state.max_steps, 1)

    def _begin_forward(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self._probe.level = self._budget.aim(self._progress)
            self._meter.__enter__()

    def _end_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        self._meter.__exit__(None, None, None)
        self._probe.level = None
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                f"{type(model).__name__} returned no loss to add the compute loss to: SparseCallback needs labels "
                "among the inputs, and neither label smoothing nor compute_loss_func"
            )
        ratio, aim = self._meter.kept(), self._budget.aim(self._progress)
        losses = self._meter.losses()
        self._values = {"kept": ratio.detach(), "kept_aim": 1.0 if aim is None else aim}
        self._values |= {f"auxiliary/{name}": each.detach() for name, each in losses.items()}
        parts = self._args.gradient_accumulation_steps if kwargs.get("num_items_in_batch") is not None else 1
        more = self._budget.loss(ratio, self._progress) + sum_losses(losses, self._weights)
        loss = loss + more.to(loss.dtype) / parts
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])


def _find_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
