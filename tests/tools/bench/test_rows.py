"""Which rows there are: every mechanism, setting, backend, pattern and length, and one clear message for a mistake."""

from typing import Any

import pytest
import torch

from tests.running import CONF
from tests.tools.bench.small import options, scene
from thresher.tools.bench.command import build_scenes, check_options
from thresher.tools.bench.jobs import Job
from thresher.tools.bench.peers import PEERS
from thresher.tools.bench.rows import (
    build_attention_jobs,
    build_decode_jobs,
    build_step_jobs,
    check_settings,
    choose_backends,
    describe_absent_peers,
    find_mechanisms,
)
from thresher.tools.bench.show import format_cell


def jobs_of(*given: str) -> list[Job]:
    return build_attention_jobs(options(*given), CONF, scene(), None)


def prepare(given: list[str]) -> None:
    """Do with a command line what comes before a measurement."""
    cfg = options(*given)
    check_options(cfg)
    check_settings(cfg, CONF)
    build_attention_jobs(cfg, CONF, scene(), None)


def test_by_default_every_mechanism_that_looks_at_content_is_timed() -> None:
    assert find_mechanisms(CONF, None) == ["blocks", "latte", "mca", "smyrf", "topk", "yoso"]


def test_rows_are_the_product_of_all_axes() -> None:
    found = jobs_of("mechanisms=[latte,topk]", "n=[16,32]", "settings.topk.keys=[4,8,16]")
    assert {(j.name, j.knobs, j.pattern, j.n) for j in found} == {
        (name, knobs, pattern, n)
        for name, many in (
            ("latte", tuple(f"kept {kept}, gate.surrogate inside, gate.tau 0.05" for kept in (0.15, 0.1, 0.05))),
            ("topk", ("keys 4", "keys 8", "keys 16")),
        )
        for knobs in many
        for pattern in ("noncausal_self", "causal_self")
        for n in (16, 32)
    }
    assert {j.hyperparameters["keys"] for j in found if j.name == "topk"} == {4, 8, 16}


def test_a_mechanism_can_have_lengths_of_its_own_and_hyper_parameters_that_no_file_lists() -> None:
    found = jobs_of(
        "mechanisms=[latte,topk]",
        "patterns=noncausal_self",
        "n=16",
        "settings.topk.n=[64,128]",
        "settings.latte.kept=0.2",
        "settings.latte.estimate.bits=8",
    )
    assert [(j.name, j.n) for j in found] == [("latte", 16), ("topk", 64), ("topk", 128)]
    assert found[0].hyperparameters["estimate"]["bits"] == 8
    assert found[0].knobs == "kept 0.2, gate.surrogate inside, gate.tau 0.05, estimate.bits 8"


def test_a_pattern_that_a_mechanism_is_not_for_has_no_row() -> None:
    found = jobs_of("mechanisms=[mca,topk]", "n=16")
    assert {j.pattern for j in found if j.name == "mca"} == {"noncausal_self"}
    with pytest.raises(ValueError, match="nothing to time"):
        jobs_of("mechanisms=mca", "patterns=causal_self")


def test_peers_that_are_installed_are_beside_them() -> None:
    found = jobs_of("mechanisms=topk", "n=16", "peers=true")
    there = {name for name, peer in PEERS.items() if peer.installed}
    assert {"transformers-yoso", "flex-attention"} <= there
    assert {j.name for j in found} == {"topk"} | there
    assert {j.backend_label for j in found if j.name in there} == {"peer"}


def test_absent_peers_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.tools.bench.peers.find_spec", lambda name: None if "reformer" in name else object())
    assert describe_absent_peers() == ["reformer-pytorch: not installed: pip install reformer-pytorch"]


def test_the_extra_installs_every_peer() -> None:
    import tomllib

    extras = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {line.partition(">")[0] for line in [*extras["bench"], *extras["hf"]]}
    assert {peer.package for peer in PEERS.values()} - {"torch"} <= packages


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mechanisms=[lattee]"], "did you mean latte"),
        (["patterns=causal"], "patterns"),
        (["n=0"], "at least 1"),
        (["n=[12.5]"], "n is a number of tokens"),
        (["settings.latte.estimate.bit=4"], "did you mean bits"),
        (["settings.latt.kept=0.1"], "did you mean latte"),
        (["settings.topk.keys=-1"], "keys"),
        (["what=atention"], "what"),
        (["dtype=float8"], "dtype"),
        (["dtype=[float32,float8]"], "dtype"),
        (["limit=0"], "limit is a number of seconds above 0"),
        (["repetitions=0"], "repetitions"),
        (["backends=cpuu"], "cpuu"),
        (["repetition=3"], "did you mean repetitions"),
        (["n=16,32"], r"one value here; write a list as"),
        (["bench=headlin"], "did you mean headline"),
    ],
)
def test_a_mistake_is_told(given: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(given)


def test_backends_are_chosen_by_name_or_all_of_them() -> None:
    from tests.tools.bench.test_checks import Backed
    from thresher.attention.none import NoAttention

    assert choose_backends("x", Backed, None, "cpu") == ["auto"]
    assert choose_backends("x", Backed, "all", "cpu") == ["reference", "right", "weak", "greedy", "deaf"]
    assert choose_backends("x", Backed, ["reference", "right"], "cpu") == ["reference", "right"]
    with pytest.raises(ValueError, match=r"backends of x"):
        choose_backends("x", Backed, "wrong", "cpu")
    assert choose_backends("x", NoAttention, None, "cpu") == [None]
    assert choose_backends("x", NoAttention, "reference", "cpu") == [None]
    with pytest.raises(ValueError, match="no other backend than its reference"):
        choose_backends("x", NoAttention, "cpu", "cpu")


def test_all_backends_are_those_that_the_device_can_run() -> None:
    from thresher.attention import find

    assert choose_backends("latte", find("latte"), "all", "cpu") == ["reference", "cpu"]
    assert "cpu" not in choose_backends("blocks", find("blocks"), "all", "cuda")
    assert {"reference", "cpu", "gather"} <= set(choose_backends("blocks", find("blocks"), "all", "cpu"))
    with pytest.raises(ValueError, match="backends of topk must be one of all, auto, reference, cpu"):
        choose_backends("topk", find("topk"), "gather", "cpu")


def test_the_rows_of_a_gpu_are_its_backends_in_both_types() -> None:
    cfg = options("bench=gpu", "device=cpu")
    assert check_options(cfg) == ["attention"]
    scenes = build_scenes(cfg)
    assert [(each.dtype, each.device) for each in scenes] == [("bfloat16", "cpu"), ("float32", "cpu")]
    found = {(j.name, j.backend, j.pattern, j.n) for j in build_attention_jobs(cfg, CONF, scenes[0], None)}
    assert found == {
        (name, backend, pattern, n)
        for name, backend in (("blocks", "triton"), ("blocks", "gather"), ("latte", "triton"))
        for pattern in ("noncausal_self", "causal_self")
        for n in (4096, 16384)
    }
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda, but PyTorch sees no such device; device=cpu"):
            check_options(options("bench=gpu"))


def test_whatever_is_causal_decodes() -> None:
    found = build_decode_jobs(options("mechanisms=[topk,latte,mca]", "decode.n=[64,128]"), CONF, scene())
    kept = options().settings.latte.kept
    assert {j.name for j in found} == {"topk", "latte"}, "MCA is not causal"
    assert {(j.model, j.pattern, j.n) for j in found} == {("decode", "causal_self", n) for n in (64, 128)}
    assert [j.kept for j in found if j.name == "latte" and j.n == 64] == list(kept)
    with pytest.raises(ValueError, match=r"decode\.n is a number of tokens"):
        build_decode_jobs(options("decode.n=[0]"), CONF, scene())


def test_training_steps_have_a_gpt_and_a_vit() -> None:
    found = build_step_jobs(options("mechanisms=[topk,mca]"), CONF, scene())
    assert {(j.name, j.model, j.n) for j in found} == {
        ("topk", "gpt", 4096),
        ("topk", "vit", 197),
        ("topk", "vit", 785),
        ("mca", "vit", 197),
        ("mca", "vit", 785),
    }
    with pytest.raises(ValueError, match="not in float64"):
        build_step_jobs(options("mechanisms=topk"), CONF, scene(dtype="float64"))


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [("kept", 0.12345, "0.123"), ("rel_error", 3e-7, "3.0e-07"), ("fwd_ms", None, ""), ("n", 64, "64")],
)
def test_values_stand_in_cells_by_their_kind(column: str, value: Any, shown: str) -> None:
    assert format_cell(column, value) == shown
