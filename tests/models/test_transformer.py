"""Our own transformer: all four patterns, padding without influence, and PyTorch's own layers as the reference."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.attention.configured import configured
from thresher.attention import Mechanism, Pattern
from thresher.attention.dense import Dense
from thresher.budget.meter import ComputeMeter
from thresher.models.transformer import Block, Classifier, EncoderDecoder, LanguageModel, Stack, find_after_first

SIZE = {"vocabulary": 12, "length": 20, "dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 24}
MAKERS = configured()


def tokens(b: int = 2, n: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, 12, (b, n), generator=torch.Generator().manual_seed(seed))


def model(make: partial[Mechanism], causal: bool) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(make, make, make, causal=causal, **SIZE).eval()


def test_it_uses_all_four_patterns() -> None:
    used = {
        module.pattern
        for causal in (True, False)
        for module in model(partial(Dense), causal).modules()
        if isinstance(module, Mechanism)
    }
    assert used == set(Pattern)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_is_pytorchs_decoder_layer(causal: bool) -> None:
    torch.manual_seed(0)
    block = Block(16, 2, 24, Dense, causal=causal, cross=Dense, dropout=0.0).double()
    theirs = nn.TransformerDecoderLayer(
        16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        for ours, other in ((block.attn, theirs.self_attn), (block.cross, theirs.multihead_attn)):
            assert ours is not None
            other.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
            other.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
            other.out_proj.load_state_dict(ours.out.state_dict())
        theirs.linear1.load_state_dict(block.ffn[0].state_dict())
        theirs.linear2.load_state_dict(block.ffn[3].state_dict())
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    visible = torch.arange(7) < torch.tensor([[7], [4]])
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    wanted = theirs(x, memory, tgt_mask=mask, memory_key_padding_mask=~visible)
    assert_close(block(x, None, memory, visible), wanted, atol=1e-10, rtol=1e-10)


def usable(make: partial[Mechanism], causal: bool) -> bool:
    return {Pattern((causal, False)), Pattern((causal, True)), Pattern.NONCAUSAL_SELF} <= make.func.supports  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "causal"),
    [(name, causal) for name, make in MAKERS.items() for causal in (True, False) if usable(make, causal)],
)
def test_padding_and_the_future_have_no_influence_with_any_mechanism(name: str, causal: bool) -> None:
    net = model(MAKERS[name], causal)
    source, target = tokens(seed=1), tokens(seed=2)
    before = net(source, target)
    longer = torch.cat([source, torch.zeros(2, 6, dtype=torch.long)], 1)
    assert_close(net(longer, torch.cat([target, torch.zeros(2, 3, dtype=torch.long)], 1))[:, :9], before)
    if causal:
        later = target.clone()
        later[:, 5:] = tokens(seed=3)[:, 5:]
        assert_close(net(source, later)[:, :5], before[:, :5])
        assert not torch.equal(net(source, later)[:, 5:], before[:, 5:])


@pytest.mark.parametrize(
    "name", [name for name, make in MAKERS.items() if Pattern.NONCAUSAL_SELF in make.func.supports]
)  # type: ignore[attr-defined]
def test_a_classifier_trains_with_any_mechanism(name: str) -> None:
    torch.manual_seed(0)
    net = Classifier(MAKERS[name], num_classes=3, **SIZE)
    meter = ComputeMeter(net)
    with meter:
        net(tokens()).square().sum().backward()
    assert len(meter.costs()) == 2
    unused = {"dense": (), "none": ("attn.q", "attn.k"), "mean": ("attn.q", "attn.k")}.get(name, ())
    for parameter_name, parameter in net.named_parameters():
        if not any(part in parameter_name for part in unused):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all()
    for padded_length in (9, 15):
        fill = torch.zeros(2, padded_length - 9, dtype=torch.long)
        logits = net.eval()(torch.cat([tokens(), fill], 1))
        assert_close(logits, net(tokens()), atol=1e-5, rtol=1e-5)


def test_positions_and_embeddings_are_not_decayed() -> None:
    for net in (
        Classifier(Dense, num_classes=3, **SIZE),
        EncoderDecoder(Dense, Dense, Dense, **SIZE),
        LanguageModel(Dense, **SIZE),
    ):
        names = {name for name, _ in net.named_parameters()}
        assert net.no_weight_decay() <= names


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"model.dim=16, the width, cannot be shared evenly by model.num_heads=3"):
        Stack(Dense, **(SIZE | {"num_heads": 3}))
    with pytest.raises(ValueError, match="21 tokens, but positions for 20"):
        Stack(Dense, **SIZE)(tokens(n=21))


def test_tokens_after_the_first_separator_have_an_embedding_more() -> None:
    torch.manual_seed(0)
    stack = Stack(Dense, **SIZE, separator=5).eval()
    x = torch.tensor([[1, 5, 2, 5, 3, 0], [5, 1, 2, 3, 4, 0], [1, 2, 3, 4, 6, 0]])
    assert find_after_first(5, x).long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0] * 6]
    before = stack(x)
    with torch.no_grad():
        stack.second += 1
    assert not torch.allclose(stack(x)[:2], before[:2])
    assert torch.equal(stack(x)[2, :5], before[2, :5])
    assert "second" not in dict(Stack(Dense, **SIZE).named_parameters())
