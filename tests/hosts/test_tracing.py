"""Symbolic tracing by torch.fx, as timm's feature extractors and quantisation tools do it; TorchScript is refused."""

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor, get_graph_node_names
from torch import Tensor, nn

from tests.hosts.models import build, images
from thresher import ComputeMeter, sparsify
from thresher.attention import available

PICTURES = torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16).sin()


def eva() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    return timm.create_model("eva02_tiny_patch14_224", **size).eval()


class Attends(nn.Module):
    """A user's layer around PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, need_weights=False)
        return x + out


@pytest.mark.parametrize("attention", available())
def test_a_traced_vision_transformer_computes_the_same_and_is_still_metered(attention: str) -> None:
    model = build().eval()
    sparsify(model, attention)
    with ComputeMeter(model) as direct:
        wanted = model(images())
    graph = torch.fx.symbolic_trace(model)
    with ComputeMeter(graph) as traced:
        assert torch.equal(graph(images()), wanted)
    assert len(traced.calls) == len(direct.calls) > 0
    assert torch.equal(traced.kept(), direct.kept())


def test_what_comes_before_and_after_attention_can_be_extracted() -> None:
    model = build().eval()
    sparsify(model, "topk", keys=3)
    names = get_graph_node_names(model)[1]
    assert {f"blocks.0.attn.{part}" for part in ("qkv", "attend", "proj")} <= set(names)
    nodes = {name: name for name in ("blocks.0.attn.qkv", "blocks.0.attn", "blocks.1", "head")}
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name in nodes
    ]
    model(images())
    for handle in handles:
        handle.remove()
    found = create_feature_extractor(model, nodes)(images())
    assert all(torch.equal(found[name], seen[name]) for name in nodes)


def test_timms_own_extractor_takes_a_sparsified_model() -> None:
    plain, model = build().eval(), build().eval()
    sparsify(model, "dense")
    features = [FeatureGraphNet(each, [0, 1])(images()) for each in (plain, model)]
    assert [torch.equal(a, b) for a, b in zip(*features, strict=True)] == [True, True]


def test_an_attention_mask_is_an_argument_of_the_graph() -> None:
    model = build().eval()
    sparsify(model, "topk", keys=3)
    block = model.get_submodule("blocks.0.attn")
    x, mask = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).tril()
    graph = torch.fx.symbolic_trace(block)
    assert torch.equal(graph(x, mask), block(x, mask))
    assert not torch.equal(graph(x, mask), graph(x))
    with pytest.raises(ValueError, match="mounted as noncausal"):
        graph(x, None, True)


def test_hosts_of_other_attention_and_of_feed_forward_layers_are_leaves() -> None:
    for model, given, options in (
        (eva(), PICTURES, {"example_inputs": PICTURES}),
        (Attends().eval(), torch.randn(2, 5, 8), {}),
        (build().eval(), images(), {"feed": True}),
    ):
        if options.pop("feed", False):
            sparsify(model, "topk_ffn", keys=0.25)
        else:
            sparsify(model, "topk", keys=3, **options)
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(given), model(given))
        with ComputeMeter(graph) as meter:
            graph(given)
        assert meter.calls


@pytest.mark.filterwarnings("ignore")  # of PyTorch itself: that TorchScript is deprecated, that values are read
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("attention", ["dense", "topk_ffn"])
def test_torchscript_is_refused_in_one_sentence(attention: str, how: str) -> None:
    model = build().eval()
    sparsify(model, attention)
    with pytest.raises(ValueError, match=r"TorchScript is not supported.*torch\.export"):
        torch.jit.script(model) if how == "script" else torch.jit.trace(model, images())
