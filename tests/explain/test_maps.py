"""Maps of every mechanism against its own output, and against softmax where that is what it computes."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.attention.configured import configured
from thresher.attention import Attended, Call, Mechanism, Pattern, find
from thresher.attention.dense import Dense
from thresher.attention.maps import Weights, find_kept_pairs
from thresher.attention.prepared import Prepared
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.attention.topk.mechanism import TopK
from thresher.attention.yoso.mechanism import Yoso
from thresher.explain.maps import record_calls, recover_map
from thresher.testing.inputs import attend, draw

LENGTHS = {False: (11, 11), True: (6, 11)}
PADDED = torch.arange(11) < torch.tensor([[11], [8]])


def mapped(mechanism: Mechanism, *, padded: bool = False, groups: int | None = None) -> tuple[Weights, Attended]:
    """Record one call of a mechanism inside a network, and recover its map."""
    return _record_and_map(mechanism, padded, groups)[:2]


def _record_and_map(mechanism: Mechanism, padded: bool, groups: int | None) -> tuple[Weights, Attended, Tensor]:
    """Record one call; return its map, what it computed, and which pairs it kept."""
    mechanism.double().eval()
    cross = mechanism.pattern.cross
    call = Call(keys=PADDED, queries=None if cross else PADDED) if padded else Call()
    inputs = draw(mechanism, lengths=LENGTHS[cross], groups=groups)
    if padded:
        inputs.v.masked_fill_(~PADDED[:, None, :, None], float("nan"))
    with record_calls(nn.ModuleDict({"attn": mechanism})) as calls:
        attended = attend(mechanism, inputs, call)
    attend(mechanism, inputs, call)
    (recorded,) = calls
    assert recorded.name == "attn"
    kept = find_kept_pairs(mechanism, recorded.q, recorded.k, recorded.v, recorded.call)
    return recover_map(recorded), attended, kept


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "pattern"), [(name, p) for name in configured() for p in Pattern if p in find(name).supports], ids=str
)
def test_the_map_times_the_values_is_the_output(name: str, padded: bool, pattern: Pattern) -> None:
    mechanism = configured()[name](num_heads=2, head_dim=8, pattern=pattern)
    before = {name: value.clone() for name, value in mechanism.state_dict().items()}
    found, attended, pairs = _record_and_map(mechanism, padded, None)
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in mechanism.state_dict().items())
    assert not found.weights[~found.visible].any()
    assert not pairs[~found.visible].any()
    if found.expected:  # sampled values: the weights are exact softmax
        inputs = draw(mechanism, lengths=LENGTHS[pattern.cross])
        softmax = scores(inputs.q, inputs.k).masked_fill(~found.visible, float("-inf")).softmax(-1).nan_to_num()
        torch.testing.assert_close(found.weights, softmax)
        assert 0 < found.error < 1
    else:
        torch.testing.assert_close(found.weights @ found.values, attended.out, rtol=1e-6, atol=1e-9)
        assert found.error < 1e-6
    assert found.scaled == (name == "yoso")
    kept = pairs.sum((-2, -1)).double()
    if name == "yoso":  # its cost is an upper bound
        assert (kept <= attended.cost.kept).all()
    else:
        torch.testing.assert_close(kept, attended.cost.kept.double())


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def test_heads_that_share_values_have_maps_of_their_own() -> None:
    mechanism = Dense(4, 8, Pattern.CAUSAL_SELF)
    found, _ = mapped(mechanism, groups=2)
    inputs = draw(mechanism, lengths=(11, 11), groups=2)
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    softmax = scores(inputs.q, inputs.k.repeat_interleave(2, 1)).masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(found.weights, softmax)


@pytest.mark.parametrize(
    "make",
    [
        partial(Yoso, expectation=True),
        partial(Yoso, dense_below=0, hash={"kind": "hadamard", "bits": 3}),
        partial(Smyrf, cluster=2, rounds=3, dedup="count"),
        partial(TopK, keys=3),
    ],
)
def test_variants(make: partial[Mechanism]) -> None:
    found, attended = mapped(make(num_heads=2, head_dim=8, pattern=Pattern.NONCAUSAL_SELF))
    torch.testing.assert_close(found.weights @ found.values, attended.out, rtol=1e-6, atol=1e-9)


def test_what_is_no_sum_of_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn: the output of Yoso .* it has no map to show"):
        mapped(Yoso(2, 8, Pattern.NONCAUSAL_SELF, conv=3))

    class Squared(Dense):
        def reference(self, x: Prepared) -> Attended:
            attended = super().reference(x)
            return attended._replace(out=attended.out.square())

    with pytest.raises(ValueError, match="no weighted sum of its values"):
        mapped(Squared(2, 8, Pattern.NONCAUSAL_SELF))


def test_a_network_without_a_mechanism_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no mechanism"), record_calls(nn.Linear(2, 2)):
        pass
