"""LATTE in blocks of examples, as it runs on a CPU."""

import pytest
import torch
from torch.testing import assert_close

from tests.attention.latte_reference import latte
from thresher.attention import Call, Pattern
from thresher.attention.latte import mechanism as latte_file
from thresher.attention.latte.mechanism import Latte
from thresher.testing.inputs import draw, first, gradients


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize("block", [1, 200])
def test_blocks_of_examples_change_neither_outputs_nor_gradients(
    block: int, unit: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales, thresholds and masks belong to an example or to all of them: nothing else is shared."""
    mechanism = latte(pattern, threshold=0.6 if unit == "spread" else 1.0, unit=unit)
    inputs = draw(mechanism, batch=5, groups=1)
    (n, m), rng = (inputs.q.shape[2], inputs.k.shape[2]), torch.Generator().manual_seed(0)
    call = Call(
        keys=first([m, 3, 4, m, 2], m),
        queries=first([n, 3, 4, n, 2], n),
        bias=torch.randn(1, mechanism.num_heads, n, m, generator=rng, dtype=torch.float64),
        pairs=torch.rand(5, 1, n, m, generator=rng) > 0.2,
    )
    whole, expected = gradients(mechanism, inputs, call)
    sizes = []
    monkeypatch.setattr(latte_file, "BLOCK_PAIRS", block)
    monkeypatch.setattr(mechanism, "attend", lambda x: sizes.append(x.batch) or Latte.attend(mechanism, x))
    blocks, found = gradients(mechanism, inputs, call)
    assert max(sizes) == max(block // (mechanism.num_heads * n * m), 1)
    assert sum(sizes) == 5
    assert_close(blocks, whole)
    assert_close(found, expected)
