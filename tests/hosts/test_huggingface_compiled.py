"""Models of transformers with mechanisms compile into one graph, padding included."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.hosts.language_models import PADDED
from thresher import sparsify
from thresher.hosts.__main__ import TOKENS, build


def compile_in_one_graph(name: str, attention: str) -> None:
    model = build(name)
    sparsify(model, attention)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": TOKENS, "attention_mask": PADDED["right"]}
    shown = PADDED["right"].bool()
    with torch.no_grad():
        assert_close(compiled(**inputs)[0][shown], model(**inputs)[0][shown])
    compiled(**inputs)[0].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "thresholds" in n)


ALL = tuple(itertools.product(("BERT", "Llama"), ("dense", "latte", "topk")))


@pytest.mark.parametrize(
    "cases", [(("Llama", "latte"),), pytest.param(ALL, marks=pytest.mark.slow)], ids=["Llama with latte", "all"]
)
def test_a_model_compiles_into_one_graph(cases: tuple[tuple[str, str], ...]) -> None:
    """In a process of its own: shape checks, which cannot be traced, are woven into this one."""
    code = (
        "from tests.hosts.test_huggingface_compiled import compile_in_one_graph; "
        f"[compile_in_one_graph(*case) for case in {cases}]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[2])
