"""A network that diverged in one token is noticed, whichever mechanism and backend runs inside."""

import pytest
import torch

from thresher import sparsify
from thresher.hosts.__main__ import TOKENS, build
from thresher.tasks.finite import all_finite


@pytest.mark.parametrize(
    ("attention", "options"),
    [("latte", {"backend": "cpu"}), ("latte", {"backend": "reference"}), ("smyrf", {"cluster": 3}), ("yoso", {})],
    ids=str,
)
def test_one_nan_in_an_embedding_reaches_every_row_that_sees_it(attention: str, options: dict[str, object]) -> None:
    model = build("BERT").eval()
    sparsify(model, attention, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS[0, 3]] = torch.nan
        logits = model.bert(TOKENS)[0]
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()
    assert not all_finite(logits.sum())
