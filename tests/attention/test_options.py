"""Every hyper-parameter of every mechanism is checked when it is built: its type and range, its name in the message."""

import math
from typing import Any

import pytest

from tests.attention.helpers import attend, draw
from thresher.attention import Pattern, available, find, hyperparameters
from thresher.attention.topk_ffn import TopKFeedForward

WORTHLESS = (math.nan, -math.inf, -1, -0.5, "x", "", None, [], {"a": 1})
FINE = {  # of the values below, what some hyper-parameters take
    "theta": (0, 1.5, math.inf),
    "tau": (1.5,),
    "alpha": (0, 1.5),
    "width": (1.5,),
    **dict.fromkeys(("always_keep", "conv", "dense_below", "bits", "seed"), (0,)),
}
OPTIONS = [(name, option) for name in available() for option in hyperparameters(find(name))]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_what_an_option_cannot_be_is_refused_by_its_name(name: str, option: str) -> None:
    flag = isinstance(hyperparameters(find(name))[option], bool)
    fine = FINE.get(option, ())
    for value in (*WORTHLESS, math.inf, 0, 1.5, *([] if flag else [True])):
        make: dict[str, Any] = {option: value}
        if any(value is f or (type(value) is type(f) and value == f) for f in fine):
            mechanism = find(name)(2, 8, Pattern.NONCAUSAL_SELF, **make)
            assert attend(mechanism, draw(mechanism)).out.isfinite().all()
            continue
        with pytest.raises(ValueError, match=option):
            find(name)(2, 8, Pattern.NONCAUSAL_SELF, **make)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("size", [{"num_heads": 1.5}, {"head_dim": "8"}, {"num_heads": True}, {"head_dim": 0}])
def test_sizes_are_whole_numbers(size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(size))):
        find("dense")(**({"num_heads": 2, "head_dim": 8, "pattern": Pattern.NONCAUSAL_SELF} | size))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("option", [{"keys": 0}, {"keys": "x"}, {"keys": True}, {"chunk": 0}, {"chunk": 1.5}])
def test_the_feed_forward_layer_checks_its_own(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        TopKFeedForward(**option)
