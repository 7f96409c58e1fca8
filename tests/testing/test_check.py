"""`thresher.testing.check` tells an author what a mechanism breaks, and an author who forgets padding does not leak."""

import pytest

from tests.attention import broken
from thresher.attention import Attended, Mechanism, Pattern, Prepared
from thresher.attention.shared.functional import masked_softmax
from thresher.testing import LEAKS, check, contract, find_faults
from thresher.testing.__main__ import main

NONCAUSAL = frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS})


class Naive(Mechanism):
    def reference(self, x: Prepared) -> Attended:
        weights = x.drop(masked_softmax(x.scores(), x.visible))
        return x.attended(weights @ x.v)


class Forgetful(Mechanism):
    supports = NONCAUSAL
    pools_tokens = True  # and masks of pairs are none of its business either

    def reference(self, x: Prepared) -> Attended:
        return x.attended(x.drop(x.scores().softmax(-1)) @ x.v)


def test_five_lines_of_softmax_keep_the_whole_contract() -> None:
    check(Naive)


def test_a_mechanism_that_forgets_padding_leaks_nothing() -> None:
    assert [str(fault) for fault in find_faults(Forgetful, contract=LEAKS)] == []


def test_the_template_cannot_be_replaced() -> None:
    with pytest.raises(TypeError, match="Own overrides forward, which all mechanisms share; override reference"):

        class Own(Naive):
            def forward(self, *inputs: object) -> None:
                """Go one's own way."""


def test_every_fault_is_named_with_its_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(c for c in contract.CONTRACT if c.name in ("dense limit", "sizes"))
    monkeypatch.setattr(contract.find_faults, "__kwdefaults__", {"contract": few})
    with pytest.raises(
        AssertionError, match="wrong_scale breaks the contract:\n  noncausal_self: dense limit: out is off"
    ):
        check(broken.wrong_scale)


def test_a_mechanism_that_fails_is_one_that_breaks_the_contract() -> None:
    class Fails(Mechanism):
        def reference(self, x: Prepared) -> Attended:
            raise RuntimeError("no idea")

    sizes = tuple(c for c in contract.CONTRACT if c.name == "sizes")
    faults = [str(fault) for fault in find_faults(Fails, contract=sizes)]
    assert faults == [f"{pattern.name.lower()}: sizes: RuntimeError: no idea" for pattern in Pattern]


def test_the_command_checks_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none"]) == 0
    assert "none" in capsys.readouterr().out
    assert main(["tests.attention.broken_state:ForgetsABuffer"]) == 1
    assert "state survives saving: something is missing from the state dict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonne", "there is no attention 'nonne'; did you mean 'none'?"),
        ("tests.testing.test_check:NONCAUSAL", "is no mechanism: it must be a subclass"),
        ("tests.nowhere:Mine", "No module named 'tests.nowhere'"),
    ],
)
def test_what_is_no_mechanism_is_refused(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert message in capsys.readouterr().err
