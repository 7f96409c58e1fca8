"""inject and sparsify: which modules they take, and what they say when they cannot."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from timm.layers.attention import Attention
from torch import nn

from tests.hosts.models import BLOCKS, build, same_state
from thresher import mount, sparsify
from thresher.attention import available
from thresher.attention.dense import Dense
from thresher.attention.latte.mechanism import Latte
from thresher.attention.mean import Mean
from thresher.hosts import mounted
from thresher.hosts.__main__ import build_table
from thresher.hosts.core import HOSTS, Host


def test_the_mechanism_is_built_with_the_hyper_parameters_given() -> None:
    model = build()
    sparsify(model, "latte", threshold=1.25, estimate={"bits": 8})
    for block in BLOCKS:
        mechanism = model.get_submodule(block).mechanism
        assert isinstance(mechanism, Latte)
        assert mechanism.estimate.bits == 8
        assert mechanism.thresholds.values().tolist() == [1.25, 1.25]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (r"blocks\.1\.", ["blocks.1.attn"]),
        (r"^blocks\.[02]", ["blocks.0.attn", "blocks.2.attn"]),
        ("attn$", BLOCKS),
        (None, BLOCKS),
    ],
)
def test_where_chooses_modules_by_name(where: str | None, names: list[str]) -> None:
    model = build()
    assert sparsify(model, "mean", where=where) == names
    assert [name for name, m in model.named_modules() if isinstance(m, Host)] == names


def test_a_name_that_matches_nothing_is_an_error_that_lists_the_names() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"no attention module matches 'layer'.*blocks\.0\.attn, blocks\.1\.attn"):
        sparsify(model, "latte", where="layer")
    assert same_state(model, build())


def test_an_unknown_mechanism_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no attention 'late'; did you mean 'latte'") as error:
        sparsify(build(), "late")
    assert all(name in str(error.value) for name in available())


def test_an_unknown_hyper_parameter_is_an_error_that_lists_the_known_ones() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"latte has no hyper-parameter 'thet'.*'bits': 4.*threshold=6\.9"):
        sparsify(model, "latte", thet=1.0)
    with pytest.raises(ValueError, match=r"dense has no hyper-parameter 'threshold'\. It has: none"):
        sparsify(model, "dense", threshold=1.0)


def test_a_refused_hyper_parameter_leaves_the_model_as_it_was() -> None:
    model = build()
    with pytest.raises(ValueError, match="at least 0"):
        sparsify(model, "latte", threshold=-1.0)
    assert not any(isinstance(m, Host) for m in model.modules())


def test_a_second_mechanism_in_the_same_place_is_an_error_that_says_what_to_do() -> None:
    model = build()
    sparsify(model, "latte")
    with pytest.raises(ValueError, match=r"already holds mechanisms.*densify"):
        sparsify(model, "mean")


def test_a_second_mechanism_in_some_of_the_places_is_an_error_too() -> None:
    model = build()
    sparsify(model, "latte", where=r"blocks\.0")
    with pytest.raises(ValueError, match="already holds"):
        sparsify(model, "mean", where=r"blocks\.[01]")
    assert [name for name, m in model.named_modules() if isinstance(m, Host)] == BLOCKS[:1]


def test_another_place_may_hold_another_mechanism() -> None:
    model = build()
    sparsify(model, "latte", where=r"blocks\.0")
    sparsify(model, "mean", where=r"blocks\.[12]")
    kinds = [type(model.get_submodule(block).mechanism) for block in BLOCKS]
    assert kinds == [Latte, Mean, Mean]


def test_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no attention module.*timm\.layers\.attention\.Attention"):
        sparsify(nn.Sequential(nn.Linear(2, 2)), "latte")


def test_a_bare_attention_module_is_referred_to_mount() -> None:
    with pytest.raises(ValueError, match=r"call mount\(\)"):
        sparsify(Attention(32, 2), "latte")


def test_a_module_that_no_host_knows_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no host knows torch\.nn.*mountable:.*timm\.layers\.attention\.Attention"):
        mount(nn.Linear(2, 2), Dense)


def test_the_table_in_the_docs_is_what_trying_finds() -> None:
    """Every mechanism takes a step of training in every host, or refuses when it is built."""
    page = Path(__file__).parents[2] / "docs" / "hosts.md"
    assert f"\n\n{build_table()}\n" in page.read_text()


def test_what_was_mounted_is_logged_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    with caplog.at_level(logging.INFO, "thresher.hosts"):
        sparsify(model, "mean", where="1")
    assert caplog.messages == ["blocks.1.attn: TimmAttention: Mean(heads=2, head_dim=16, noncausal_self)"]
    assert list(mounted(model)) == ["blocks.1.attn"]


def test_a_library_too_old_for_its_host_is_named_and_hinders_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(HOSTS, "nothing", "torch")
    sparsify(build(), "mean")
    assert "models of torch cannot be reached: No module named 'thresher.hosts.nothing'" in caplog.text


def test_importing_thresher_imports_no_library_of_models() -> None:
    code = "import sys, thresher, thresher.hosts; print({'timm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_mounting_needs_nothing_before_it() -> None:
    code = (
        "from timm.layers.attention import Attention; import thresher; from thresher.attention.dense import Dense; "
        "print(type(thresher.mount(Attention(8, 2), Dense)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "TimmAttention"
