"""Top-k feed-forward layers inside models of timm's, of Hugging Face's and our own."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import transformers
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.models import SIZE, build, images, same_state
from thresher import ComputeMeter, densify, sparsify
from thresher.attention.dense import Dense
from thresher.feedforward.topk_ffn import TopKFeedForward
from thresher.hosts.core import Host
from thresher.hosts.feedforward import FeedForwardHost, mount_feed_forward
from thresher.models.transformer import Classifier
from thresher.testing.inputs import noise_like

TEXT = {"vocab_size": 50, "max_position_embeddings": 16}
BERT = {**TEXT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
LLAMA = {**BERT, "num_key_value_heads": 1}


def t5(**changes: object) -> Callable[[], nn.Module]:
    return lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, **changes))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (build, 3),
    "swiglu": (partial(timm.create_model, "vit_tiny_patch16_224", mlp_layer=SwiGLU, **SIZE), 3),
    "packed swiglu": (partial(timm.create_model, "vit_tiny_patch16_224", mlp_layer=SwiGLUPacked, **SIZE), 3),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**BERT)), 2),
    "roberta": (lambda: transformers.RobertaModel(transformers.RobertaConfig(**BERT)), 2),
    "t5": (t5(), 2),
    "gated t5": (t5(feed_forward_proj="gated-gelu"), 2),
    "llama": (lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)), 2),
    "ours": (
        lambda: Classifier(
            partial(Dense), num_classes=3, vocabulary=50, length=16, dim=16, depth=2, num_heads=2, ffn_dim=24
        ),
        2,
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def output(model: nn.Module) -> Tensor:
    text = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    if isinstance(model, transformers.PreTrainedModel):
        return model(input_ids=text).last_hidden_state
    out: Tensor = model(text if isinstance(model, Classifier) else images())
    return out


@pytest.mark.parametrize("name", MODELS)
def test_all_units_kept_changes_nothing_and_taking_it_out_gives_the_model_back(name: str) -> None:
    model, original = made(name), made(name)
    wanted = output(original)
    names = sparsify(model, "topk_ffn", keys=1.0)
    assert len(names) == MODELS[name][1]
    assert same_state(model, original)
    assert_close(output(model), wanted, atol=2e-6, rtol=1e-5)
    densify(model)
    assert torch.equal(output(model), wanted)
    assert not any(isinstance(m, Host) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_few_units_train_and_are_counted(name: str) -> None:
    model = made(name)
    before = output(model)
    sparsify(model, "topk_ffn", keys=0.25)
    meter = ComputeMeter(model)
    with meter:
        after = output(model)
    costs = [cost for name, cost in meter.calls if isinstance(model.get_submodule(name), TopKFeedForward)]
    assert len(costs) == MODELS[name][1]
    for cost in costs:
        assert (cost.kept / cost.visible == 0.25).all()
        assert (cost.total < cost.dense).all()
    assert not torch.allclose(before, after, atol=1e-4)
    (after * noise_like(after)).sum().backward()
    layers = [m for m in model.modules() if isinstance(m, FeedForwardHost)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_attention_and_feed_forward_layers_share_one_meter_and_leave_together() -> None:
    model = build()
    wanted = output(model)
    sparsify(model, "topk", keys=0.5)
    sparsify(model, "topk_ffn", keys=0.25)
    meter = ComputeMeter(model)
    with meter:
        output(model)
    assert [name.rpartition(".")[0] for name, _ in meter.calls] == [
        f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp")
    ]
    assert len(densify(model)) == 6
    assert torch.equal(output(model), wanted)


def test_a_second_one_in_the_same_place_is_refused() -> None:
    model = build()
    sparsify(model, "topk_ffn", where=r"blocks\.0")
    with pytest.raises(ValueError, match="already holds"):
        sparsify(model, "topk_ffn")
    assert sparsify(model, "topk_ffn", where=r"blocks\.[12]") == ["blocks.1.mlp", "blocks.2.mlp"]


def test_errors_name_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"no feed-forward module matches 'layer'; there are: blocks\.0\.mlp"):
        sparsify(build(), "topk_ffn", where="layer")
    with pytest.raises(
        ValueError, match=r"topk_ffn has no hyper-parameter 'key'; did you mean keys\? It has: keys=0\.15, chunk=4096"
    ):
        sparsify(build(), "topk_ffn", key=3)
    with pytest.raises(ValueError, match=r"Sequential has no feed-forward module.*timm\.layers\.mlp\.Mlp"):
        sparsify(nn.Sequential(nn.Linear(2, 2)), "topk_ffn")


class Doubled(Mlp):
    """Looks like an Mlp, but is none."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)
        return out


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Doubled(8, 16), "computes more than projections"),
        (Mlp(8, 16, norm_layer=nn.LayerNorm), "computes more than projections"),
        (Mlp(8, 16, use_conv=True), "Mlp.fc1 is a Conv2d"),
        (Mlp(8, 16, act_layer=nn.PReLU), "has parameters"),
        (nn.Linear(2, 2), "no host knows torch.nn.modules.linear.Linear; mountable: .*Mlp"),
    ],
    ids=["subclass", "norm", "convolution", "activation", "unknown"],
)
def test_what_is_not_such_a_layer_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        mount_feed_forward(module, TopKFeedForward)


@pytest.mark.parametrize("gate_last", [True, False])
def test_both_orders_of_a_packed_gate(gate_last: bool) -> None:
    torch.manual_seed(0)
    layer = GluMlp(8, 16, gate_last=gate_last, act_layer=nn.SiLU).eval()
    x = torch.randn(2, 3, 8)
    wanted = layer(x)
    assert_close(mount_feed_forward(layer, partial(TopKFeedForward, keys=1.0))(x), wanted)


def test_a_transformers_layer_that_only_sounds_like_one_is_refused() -> None:
    model = transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    )
    with pytest.raises(TypeError, match="GPT2MLP has no gate_proj"):
        sparsify(model, "topk_ffn")
