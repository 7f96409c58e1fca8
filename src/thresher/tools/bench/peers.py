"""Peers: attention of other packages, where they are installed.

Nothing is checked of them and they count no costs; `rel_error` says how far each is from softmax attention. Several are
not meant to be near it: Reformer's keys are its queries, YOSO has another kernel.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.contract import Pattern
from thresher.testing.inputs import Inputs
from thresher.tools.bench.contenders import Contender, build_baseline
from thresher.tools.bench.inputs import load_inputs
from thresher.tools.bench.jobs import Job, Scene, find_pattern

SELF = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
NONCAUSAL = frozenset({Pattern.NONCAUSAL_SELF})


@dataclass(frozen=True)
class Peer:
    """Attention of another package.

    Attributes:
        module: What is imported of it.
        package: What `pip install` calls it.
        make: Builds it for a scene, a pattern and hyper-parameters; returns what attends, and the dense baseline of the
            same work where that is not plain attention.
        supports: The patterns it is for.
    """

    module: str
    package: str
    make: Callable[..., tuple[Contender, Contender | None]]
    supports: frozenset[Pattern] = SELF

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    @property
    def defaults(self) -> dict[str, Any]:
        """Its hyper-parameters here, with their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _functional(module: nn.Module, attend: Callable[[Inputs], Tensor], fewest: int = 1) -> tuple[Contender, None]:
    return Contender(lambda inputs: (attend(inputs), None), module, fewest), None


def _reformer(
    scene: Scene, pattern: Pattern, *, bucket_size: int = 64, n_hashes: int = 4
) -> tuple[Contender, Contender | None]:
    from reformer_pytorch import LSHAttention

    module = LSHAttention(bucket_size=bucket_size, n_hashes=n_hashes, causal=pattern.causal)

    def attend(inputs: Inputs) -> Tensor:
        out: Tensor = module(inputs.q.flatten(0, 1), inputs.v.flatten(0, 1))[0]
        return out.view_as(inputs.v)

    return _functional(module, attend, 2 * bucket_size)


def _performer(scene: Scene, pattern: Pattern, *, nb_features: int = 256) -> tuple[Contender, Contender | None]:
    from performer_pytorch import FastAttention

    module = FastAttention(dim_heads=scene.head_dim, nb_features=nb_features, causal=pattern.causal).to(scene.device)
    return _functional(module, lambda inputs: module(inputs.q, inputs.k, inputs.v))


def _topk(scene: Scene, pattern: Pattern, *, sparse_topk: int = 128) -> tuple[Contender, Contender | None]:
    from x_transformers.attend import Attend

    module = Attend(heads=scene.heads, causal=pattern.causal, sparse_topk=sparse_topk)
    return _functional(module, lambda inputs: module(inputs.q, inputs.k, inputs.v)[0], sparse_topk)


def _yoso(scene: Scene, pattern: Pattern, *, hash_code_len: int = 9) -> tuple[Contender, Contender | None]:
    from transformers.models.yoso.modeling_yoso import YosoCumulation

    def attend(inputs: Inputs) -> Tensor:
        # Scaled a little: the arc cosine of a product just above 1 is not a number.
        q, k = (F.normalize(x.flatten(0, 1), dim=-1) * (1 - 1e-6) for x in (inputs.q, inputs.k))
        seen = torch.ones(q.shape[:2], device=q.device)
        out = YosoCumulation.apply(seen, seen, q, k, inputs.v.flatten(0, 1), {"hash_code_len": hash_code_len})
        return F.normalize(out, dim=-1).view_as(inputs.v)

    return _functional(nn.Identity(), attend)


def _nystrom(scene: Scene, pattern: Pattern, *, num_landmarks: int = 64) -> tuple[Contender, Contender | None]:
    """Build a whole attention module, projections included; so is its baseline, which shares them."""
    from nystrom_attention import NystromAttention

    heads, width = scene.heads, scene.heads * scene.head_dim
    module = NystromAttention(
        dim=width, dim_head=scene.head_dim, heads=heads, num_landmarks=num_landmarks, residual=False
    )
    module = module.to(scene.device, scene.torch_dtype)

    def tokens(inputs: Inputs) -> Tensor:
        return inputs.v.transpose(1, 2).flatten(2)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def plain(inputs: Inputs) -> tuple[Tensor, None]:
        q, k, v = map(split, module.to_qkv(tokens(inputs)).chunk(3, dim=-1))
        return split(module.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))), None

    dense = Contender(plain, module)
    return _functional(module, lambda inputs: split(module(tokens(inputs))), num_landmarks)[0], dense


def _flex(scene: Scene, pattern: Pattern, *, window: int | None = None) -> tuple[Contender, Contender | None]:
    """Compile flex_attention: exact without a window, else each query sees the tokens at most window / 2 away."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[int, BlockMask] = {}

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = i >= j if pattern.causal else i == i
        return inside if window is None else inside & ((i - j).abs() <= window // 2)

    def attend(inputs: Inputs) -> Tensor:
        n = inputs.q.shape[2]
        if n not in masks and (pattern.causal or window is not None):
            masks[n] = create_block_mask(seen, None, None, n, n, device=scene.device)
        out: Tensor = compiled(inputs.q, inputs.k, inputs.v, block_mask=masks.get(n))
        return out

    return _functional(nn.Identity(), attend)


PEERS: Mapping[str, Peer] = {
    "reformer-pytorch": Peer("reformer_pytorch", "reformer-pytorch", _reformer),
    "performer-pytorch": Peer("performer_pytorch", "performer-pytorch", _performer),
    "nystrom-attention": Peer("nystrom_attention", "nystrom-attention", _nystrom, NONCAUSAL),
    "x-transformers-topk": Peer("x_transformers", "x-transformers", _topk),
    "transformers-yoso": Peer("transformers", "transformers", _yoso, NONCAUSAL),
    "flex-attention": Peer("torch.nn.attention.flex_attention", "torch", _flex),
}


def build_peer_contender(job: Job, scene: Scene) -> tuple[Contender, Contender, Inputs]:
    """Build the attention of another package, its dense baseline, and inputs for both."""
    contender, dense = PEERS[job.name].make(scene, find_pattern(job), **job.hyperparameters)
    return contender, dense or build_baseline(job), load_inputs(job, scene)
