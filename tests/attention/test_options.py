"""Every hyper-parameter of every mechanism is checked when it is built: its type and range, its name in the message."""

import math
from dataclasses import asdict
from typing import Any

import pytest

from thresher.attention import Pattern, available, find, hyperparameters
from thresher.feedforward.topk_ffn import TopKFeedForward
from thresher.testing.inputs import attend, draw

WORTHLESS = (math.nan, -math.inf, -1, -0.5, "x", "", None, [], {"a": 1})
FINE = {
    "threshold": (0, 1.5, math.inf),
    "gate.tau": (1.5,),
    "alpha": (0, 1.5),
    "width": (1.5,),
    **dict.fromkeys(("always_keep", "block.top", "conv", "dense_below", "hash.bits", "sampling.seed"), (0,)),
}
DEFAULTS = {name: hyperparameters(find(name)) for name in available()}
OPTIONS = {
    (name, option if group is None else f"{group}.{option}"): default
    for name, defaults in DEFAULTS.items()
    for group, options in [(None, defaults), *((g, o) for g, o in defaults.items() if isinstance(o, dict))]
    for option, default in options.items()
    if not isinstance(default, dict)
}
GROUPS = [
    (name, group) for name, defaults in DEFAULTS.items() for group in defaults if isinstance(defaults[group], dict)
]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_what_an_option_cannot_be_is_refused_by_its_name(name: str, option: str) -> None:
    flag = isinstance(OPTIONS[name, option], bool)
    group, _, inner = option.rpartition(".")
    fine = FINE.get(option, ())
    for value in (*WORTHLESS, math.inf, 0, 1.5, *([] if flag else [True])):
        make: dict[str, Any] = {group: {inner: value}} if group else {option: value}
        if any(value is f or (type(value) is type(f) and value == f) for f in fine):
            mechanism = find(name)(2, 8, Pattern.NONCAUSAL_SELF, **make)
            assert attend(mechanism, draw(mechanism)).out.isfinite().all()
            continue
        with pytest.raises(ValueError, match=option):
            find(name)(2, 8, Pattern.NONCAUSAL_SELF, **make)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_a_group_of_options_is_a_mapping_of_its_own_names(name: str, group: str) -> None:
    for value in WORTHLESS[:-1]:
        with pytest.raises(ValueError, match=f"{group} must be a mapping"):
            find(name)(2, 8, Pattern.NONCAUSAL_SELF, **{group: value})
    known = next(iter(DEFAULTS[name][group]))
    with pytest.raises(ValueError, match=rf"no option {group}.{known}x; did you mean {group}.{known}\?"):
        find(name)(2, 8, Pattern.NONCAUSAL_SELF, **{group: {f"{known}x": 1}})
    built = find(name)(2, 8, Pattern.NONCAUSAL_SELF, **{group: {}})
    assert asdict(getattr(built, group)) == DEFAULTS[name][group], "what is not named keeps its default"


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
