"""Every operator of every kernel tells the compiler the truth: sizes, types and strides of what it returns."""

import importlib.util
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

import thresher.attention
from tests.kernels.tails import DECODED_WITHOUT, WITHOUT, draw_tail
from thresher.attention.blocks import kernel as blocks
from thresher.attention.latte import kernel as latte
from thresher.attention.mca import kernel as mca
from thresher.attention.smyrf import kernel as smyrf
from thresher.attention.topk import kernel as topk
from thresher.attention.yoso import kernel as yoso
from thresher.kernels.build import can_use
from thresher.testing.inputs import noise_like

pytestmark = pytest.mark.skipif(
    not all(map(can_use, ("blocks", "latte", "smyrf", "topk", "yoso", "mca"))),
    reason="there is no C++ compiler that builds the kernels",
)

Sizes = tuple[int, int, int]  # groups, queries, keys
Arguments = dict[str, Any]  # by name
D, DV = 6, 4


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(shape), seed=seed).to(dtype)


def shown(*shape: int) -> Tensor:
    return torch.arange(max(shape[-1], 1))[: shape[-1]].expand(shape).remainder(3) != 1


def qkv(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, n, m = sizes
    shapes = {"q": (n, D), "k": (m, D), "v": (m, DV)}
    return {name: drawn(dtype, g, *rest, seed=i) for i, (name, rest) in enumerate(shapes.items())}


def encoding(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    return {"x": qkv(sizes, dtype)["q"], "per_token": True, "bits": 4, "truncate": False}


def gate(sizes: Sizes, dtype: torch.dtype) -> latte.Gate:
    (g, n, m), wide = sizes, torch.float64 if dtype is torch.float64 else torch.float32
    q_codes, k_codes = (
        (drawn(wide, g, length, D, seed=length) * 2).round().clamp(-8, 7).to(torch.int8) for length in (n, m)
    )
    return latte.Gate(
        q_codes=q_codes,
        k_codes=k_codes,
        q_unit=torch.full((g, n), 0.5, dtype=wide),
        k_unit=torch.full((g, m), 0.25, dtype=wide),
        shown_q=shown(g, n),
        shown_k=shown(g, m),
        threshold=torch.ones(g, dtype=wide),
        tau=torch.tensor(0.2),
        shift=None,
        spread=True,
        always_keep=1,
        step=256.0,
        into_scores=True,
        inside=False,
    )


def gated(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    return {**qkv(sizes, dtype), "scale": 0.25, **WITHOUT, **gate(sizes, dtype)._asdict()}


def gated_back(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    given = gated(sizes, dtype)
    out, kept, row_max, row_sum, tail_weight = latte.attend(**given)
    results = {"out": out, "row_max": row_max, "row_sum": row_sum, "tail_weight": tail_weight}
    return {"grad": noise_like(out), "grad_kept": torch.ones_like(kept), **results, **given}


def shared(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    sharing = blocks.Sharing(size=3, votes=True, every=2)
    given = gated(sizes, dtype)
    return given | {"k_unit": given["k_unit"][:, :1], **sharing._asdict()}


def shared_back(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    given = shared(sizes, dtype)
    results = blocks.Attention(*blocks.attend(**given))._asdict()
    grads = {"grad": noise_like(results["out"]), "grad_kept": torch.ones_like(results["kept"])}
    for name in ("kept", "of_rows", "computed"):
        del results[name]
    return {**grads, **results, **given}


def decoding(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    given = gated(sizes, dtype)
    for name in ("shown_q", "tau", "shift", "into_scores", "inside"):
        del given[name]
    return given | DECODED_WITHOUT | {"threshold": given["threshold"][:, None].repeat(1, sizes[1])}


def choosing(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, n, m = sizes
    most = min(3, m)
    limit = torch.full((g, n), min(most, (m + 1) // 3))
    sizes_and_limits = {"seen": shown(g, m), "limit": limit, "most": most, "shift": None}
    return {**qkv(sizes, dtype), "scale": 0.5, **sizes_and_limits, **WITHOUT}


def choosing_back(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    given = choosing(sizes, dtype)
    out, weight, index, tail_weight = topk.attend(**given)
    results = {"weight": weight, "index": index, "tail_weight": tail_weight, "out": None}
    for name in ("limit", "most"):
        del given[name]
    return {"grad": noise_like(out), **given, **results}


def clustered(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    """Return two clusters of one round, in the order of tokens."""
    tokens = [torch.arange(length).expand(sizes[0], length).contiguous() for length in sizes[1:]]
    token_q, token_k = (x.unflatten(1, (2, x.shape[1] // 2)) for x in tokens)
    query_cluster, key_cluster = (x.div(max(x.shape[1] // 2, 1), rounding_mode="floor")[None] for x in tokens)
    part = smyrf.Part(token_q, token_k, tokens[0].new_empty(0), query_cluster, key_cluster, causal=False, times=1)
    given = qkv(sizes, dtype)
    return {**given, "shift": 0, **draw_tail(given["q"]), **{name: [x] for name, x in part._asdict().items()}}


def clustered_back(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    given = clustered(sizes, dtype)
    results = dict(zip(smyrf.RESULTS, smyrf.attend_in_parts(**given), strict=True))
    del results["meetings"], results["repeats"]
    return {"grad": noise_like(results["out"]), **results, **given}


def ranking(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    return {"x": drawn(dtype, 2, *sizes[:2])}


def packing(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    return {"y": drawn(dtype, sizes[1], 3 * 4), "bits": 4}


def codes(sizes: Sizes) -> list[Tensor]:
    return [
        (torch.arange(g * n) % 8).view(1, g, n).repeat(3, 1, 1).short()
        for g, n in itertools.product(sizes[:1], sizes[1:])
    ]


def summing(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, _, m = sizes
    receivers, senders = codes(sizes)
    given = {"receivers": receivers, "senders": senders, "seen": shown(g, m), "x": drawn(dtype, g, m, DV)}
    return {**given, "slots": 8, "order": yoso.ALL, "shift": 0}


def bounding(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, n, m = sizes
    codes_q, codes_k = codes(sizes)
    given = {"grad": drawn(dtype, g, n, DV, seed=9), "codes_q": codes_q, "codes_k": codes_k, "seen": shown(g, m)}
    return {**qkv(sizes, dtype), **given, "slots": 8, "shift": None, "scale": 0.5}


def sampling(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, b, m = sizes
    chances = torch.full((g, D), 1 / D, dtype=dtype)
    return {
        "x": drawn(dtype, b, m, D, seed=1),
        "rows": drawn(dtype, g, D, DV),
        "chances": chances,
        "cumulated": chances.cumsum(-1),
        "uniform": drawn(dtype, m, b, g, D, seed=3).abs().remainder(1),
        "counts": torch.full((b, g, m), 2.0, dtype=dtype),
    }


def sampling_back(sizes: Sizes, dtype: torch.dtype) -> Arguments:
    g, b, m = sizes
    return {"grad": drawn(dtype, b, g, m, DV, seed=5), **sampling(sizes, dtype)}


OPERATORS: dict[CustomOpDef, Callable[[Sizes, torch.dtype], Arguments]] = {
    latte.encode: encoding,
    latte.attend: gated,
    latte.back: gated_back,
    latte.decode: decoding,
    blocks.attend: shared,
    blocks.back: shared_back,
    topk.attend: choosing,
    topk.back: choosing_back,
    smyrf.compute_ranks: ranking,
    smyrf.attend_in_parts: clustered,
    smyrf.back: clustered_back,
    yoso.pack: packing,
    yoso.sum_collisions: summing,
    yoso.compute_bound: bounding,
    mca.encode: sampling,
    mca.back: sampling_back,
}
READ_BF16 = {op for op in OPERATORS if op._name.startswith(("blocks", "latte", "topk", "smyrf"), len("thresher::"))} - {
    smyrf.compute_ranks
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads last": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}
SIZES: list[Sizes] = [(1, 8, 8), (3, 8, 12), (1, 1, 4), (0, 8, 8), (2, 0, 8)]


def laid_out(arguments: Arguments, layout: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the same arguments with other strides; vectors and what is empty stay as they are."""
    result: Arguments = tree_map(
        lambda x: layout(x) if isinstance(x, Tensor) and x.ndim > 1 and x.numel() else x, arguments
    )
    return result


def described(results: Any) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    return [(x.shape, x.stride(), x.dtype) for x in tree_flatten(results)[0]]


def cases(op: CustomOpDef) -> list[tuple[Sizes, torch.dtype, str]]:
    dtypes = [torch.float32, torch.float64, *([torch.bfloat16] if op in READ_BF16 else [])]
    sizes = [(g, 2 * n, m) if op in (smyrf.attend_in_parts, smyrf.back) else (g, n, m) for g, n, m in SIZES]
    return list(itertools.product(sizes, dtypes, LAYOUTS))


def test_no_operator_is_left_out() -> None:
    rooms = pkgutil.iter_modules(thresher.attention.__path__, "thresher.attention.")
    names = [f"{room.name}.kernel" for room in rooms if room.ispkg]
    modules = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    assert set(OPERATORS) == {op for module in modules for op in vars(module).values() if isinstance(op, CustomOpDef)}


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op._name)
def test_what_is_announced_is_what_is_returned(op: CustomOpDef) -> None:
    """Compiled code reads results by the announced strides: of one example, they once were those of the input."""
    for sizes, dtype, layout in cases(op):
        given = laid_out(OPERATORS[op](sizes, dtype), LAYOUTS[layout])
        with FakeTensorMode() as mode:
            announced = op(**tree_map(lambda x, m=mode: m.from_tensor(x) if isinstance(x, Tensor) else x, given))
        assert described(announced) == described(op(**given)), (sizes, dtype, layout)


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op._name)
def test_results_do_not_depend_on_strides(op: CustomOpDef) -> None:
    for sizes, dtype, layout in cases(op):
        given = laid_out(OPERATORS[op](sizes, dtype), LAYOUTS[layout])
        plain = tree_map(lambda x: x.contiguous().clone() if isinstance(x, Tensor) else x, given)
        for one, other in zip(*(tree_flatten(op(**each))[0] for each in (given, plain)), strict=True):
            assert torch.equal(one, other), (sizes, dtype, layout)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op._name)
@pytest.mark.parametrize("layout", ["heads last", "expanded"])
def test_operators_keep_the_rules_of_torch_for_one_example(op: CustomOpDef, layout: str) -> None:
    """As each kernel's own test has it for several, here for a batch of one; gradients, where there are any, too."""
    sizes = (1, 2, 4) if layout == "heads last" else (2, 4, 4)
    given = laid_out(OPERATORS[op](sizes, torch.float32), LAYOUTS[layout])
    if op in (blocks.attend, latte.attend, topk.attend, smyrf.attend_in_parts, mca.encode):
        for name in ("x", "rows") if op is mca.encode else ("q", "k"):
            given[name].requires_grad_()
    torch.library.opcheck(op, (), given)
