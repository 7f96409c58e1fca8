"""Thresholds trained by the Trainer of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from thresher import load_adapter, sparsify
from thresher.attention.shared.thresholds import named_thresholds
from thresher.integrations.transformers import ADAPTER, SparseCallback

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
STEPS = 20


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random walks over a small vocabulary."""

    def __init__(self, number: int = 80, length: int = 24) -> None:
        steps = torch.randint(-2, 3, (number, length), generator=torch.Generator().manual_seed(0))
        self.tokens = steps.cumsum(1) % 20

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def build(attention: str | None = "latte", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if attention is not None:
        sparsify(model, attention, **options)
    return model


def build_trainer(model: nn.Module, folder: Path, callback: SparseCallback, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "save_steps": 10,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    settings = TrainingArguments(output_dir=str(folder), **arguments | changes)
    return Trainer(model=model, args=settings, train_dataset=Texts(), callbacks=[callback])


def test_the_budget_holds_at_the_end_and_is_logged(tmp_path: Path) -> None:
    model = build(tail="mean")
    before = len(model._forward_pre_hooks), len(model._forward_hooks)
    trainer = build_trainer(model, tmp_path, SparseCallback(0.3))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert next(row["kept_aim"] for row in logged) > 0.5
    assert logged[-1]["kept_aim"] == pytest.approx(0.3 * 0.96)
    assert logged[-1]["kept"] == pytest.approx(0.3, abs=0.1)
    offsets = torch.cat([each.offset for _, each in named_thresholds(model)])
    assert offsets.abs().max() > 1e-3, "thresholds are trained, not only calibrated"
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before, "its hooks are gone"


def test_each_checkpoint_holds_an_adapter_of_its_weights(tmp_path: Path) -> None:
    model = build()
    build_trainer(model, tmp_path, SparseCallback(0.3)).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    loaded = build(None)
    own = {name: x for name, x in model.state_dict().items() if ".mechanism." not in name}
    loaded.load_state_dict(own)
    load_adapter(loaded, folder / ADAPTER)
    tokens = {"input_ids": Texts().tokens[:2]}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**tokens).logits, model.eval()(**tokens).logits)


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole, parts = build(tail="mean"), build(tail="mean")
    build_trainer(whole, tmp_path / "whole", SparseCallback(0.3)).train()
    first = build_trainer(parts, tmp_path / "parts", SparseCallback(0.3))
    first.train()
    again = build(tail="mean")
    resumed = build_trainer(again, tmp_path / "parts", SparseCallback(0.3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    for name, x in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], x, msg=name)


def test_accumulated_batches_add_the_compute_loss_once(tmp_path: Path) -> None:
    """One step of 8 examples, and of 2 x 4, have nearly the same gradient at the thresholds."""
    found = {}
    for size, parts in ((8, 1), (4, 2)):
        model = build()
        callback = SparseCallback(0.3, start=0.0, end=0.01, weight=1000.0)
        given: list[torch.Tensor] = []
        step = callback.on_pre_optimizer_step

        def watch(
            *args: Any, given: list[torch.Tensor] = given, model: Any = model, step: Any = step, **kw: Any
        ) -> None:
            given.append(torch.cat([each.offset.grad for _, each in named_thresholds(model)]))
            step(*args, **kw)

        callback.on_pre_optimizer_step = watch  # type: ignore[method-assign]
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_grad_norm": 0}
        build_trainer(model, tmp_path / str(parts), callback, max_steps=2, **changes).train()
        found[parts] = given[-1]
    assert 0.5 < float(found[2].norm() / found[1].norm()) < 1.5


def test_thresholds_that_keep_every_key_are_annealed_too(tmp_path: Path) -> None:
    model = build(threshold=float("inf"))
    build_trainer(model, tmp_path, SparseCallback(0.3), max_steps=2, logging_steps=1).train()
    assert all(each.base.isfinite().all() and each.eval_base.isfinite().all() for _, each in named_thresholds(model))


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    for attention in (None, "topk"):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no trainable thresholds: call sparsify"):
            build_trainer(build(attention), tmp_path, SparseCallback(0.3)).train()
    with pytest.raises(ValueError, match=r"returned no loss.*neither label smoothing"):
        build_trainer(build(), tmp_path, SparseCallback(0.3), label_smoothing_factor=0.1).train()
    with pytest.raises(ValueError, match=r"compute\.target is a share"):
        SparseCallback(1.5)
