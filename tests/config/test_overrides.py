"""Overrides: values written for Hydra's grammar come back as they were, and what cannot be meant is refused by name."""

import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.running import CONF
from thresher.config.overrides import (
    ANY_TYPE,
    COUNTS_OR_SHARES,
    check,
    check_key,
    check_type,
    compose_config,
    list_chosen,
    list_places,
    parse,
    quote,
)


def read(text: str) -> object:
    (override,) = parse([f"run.dir={quote(text)}"])
    return override.value()


@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\\,=[]{}:~$#\""), min_size=1))
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert read(text) == text


@pytest.mark.parametrize(
    "text", ["runs/größer", "C:\\runs\\a", "it's", "a\\'b", "ends in \\", "null", "1e3", "a,b", " a ", ""]
)
def test_what_paths_and_names_may_hold_comes_back(text: str) -> None:
    assert read(text) == text


def test_plain_paths_stay_as_they_are() -> None:
    assert quote("runs/mine/2026-11-25_08-00-00") == "runs/mine/2026-11-25_08-00-00"


def refused(name: str, *arguments: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check(CONF, name, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.threshold=abc", "attention.threshold must be a number, like 6.9, not 'abc'"),
        ("attention.threshold=true", "attention.threshold must be a number, like 6.9, not True"),
        ("attention.threshold=[1,2]", "attention.threshold must be a number, like 6.9, not [1, 2]"),
        ("attention.threshold='1'", "attention.threshold must be a number, like 6.9, not '1'"),
        ("attention.trainable=maybe", "attention.trainable must be true or false, not 'maybe'"),
        ("attention.trainable=1", "attention.trainable must be true or false, not 1"),
        ("seed=1e3", "seed must be a whole number, like 0, not 1000.0"),
        ("trainer.max_epochs=", "trainer.max_epochs must be a whole number, like 8, not ''"),
        ("++seed=abc", "seed must be a whole number, like 0, not 'abc'"),
        ("optimizer.betas=0.9", "optimizer.betas must be a list, like [0.9, 0.999], not 0.9"),
        ("run=mine", "run holds entries by name, and cannot be 'mine'; set one of run.name, run.dir"),
    ],
)
def test_another_type_than_the_configs_is_refused(override: str, message: str) -> None:
    assert refused("train", override) == message


@pytest.mark.parametrize(
    "arguments",
    [
        ["attention.threshold=5", "attention.threshold=.5", "attention.threshold=inf", "attention.threshold=1e-3"],
        ["attention.threshold=null", "trainer.max_epochs=null", "task.clip=null", "trainer.limit_val_batches=0.5"],
        ["attention.estimate.bits=exact", "trainer.devices=auto", "trainer.devices=[0,1]", "trainer.fast_dev_run=3"],
        ["logger=wandb", "logger.wandb.log_model=all"],
        ["trainer=fsdp", "trainer.strategy=ddp", "trainer.devices=2"],
        ["seed=${trainer.max_epochs}", "attention.gate.tau=${attention.threshold}", "seed=${oc.env:HOME}"],
        ["~attention.threshold", "~callbacks.watch", "+attention.new=word", "hydra.job.chdir=word"],
        ["seed=int(3.0)", "attention.threshold=float(3)", "run.name=5", "optimizer.betas=[0.5,0.9]"],
        ["experiment=dropin_vit", "dropin.mechanisms.latte.kept=0.2", "dropin.mechanisms.smyrf.rounds=[2]"],
        ["experiment=dropin_minilm", "dropin.mechanisms.yoso.hash.bits=8", "dropin.mechanisms.yoso.hashes=[32,128]"],
    ],
    ids=str,
)
def test_what_may_be_meant_is_let_through(arguments: list[str]) -> None:
    check(CONF, "train", arguments)


@pytest.mark.parametrize("key", COUNTS_OR_SHARES)
def test_a_share_may_take_the_place_of_a_count(key: str) -> None:
    stored = OmegaConf.create({})
    OmegaConf.update(stored, key, 2)
    check_type(stored, key, 0.5)
    with pytest.raises(ValueError, match=f"{key} must be a number, like 2, not 'abc'"):
        check_type(stored, key, "abc")


@pytest.mark.parametrize("override", ["what=train_step", "train_step.vit.n=197", "n=[16,32]"])
def test_where_one_or_several_may_be_meant_both_are(override: str) -> None:
    check(CONF, "bench", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("latte.kept=[0.5,abc]", "latte.kept must be a number, like 0.5, not 'abc'"),
        ("yoso.hashes=[8,true]", "yoso.hashes must be a whole number, like 128, not True"),
        ("yoso.hash.bits=2.5", "yoso.hash.bits must be a whole number, like 4, not 2.5"),
    ],
)
def test_each_setting_to_drop_in_is_checked(override: str, message: str) -> None:
    refusal = refused("train", "experiment=dropin_minilm", f"dropin.mechanisms.{override}")
    assert refusal == f"dropin.mechanisms.{message}"


def test_names_of_several_types_exist() -> None:
    for key in ANY_TYPE:
        choices = ["logger=wandb"] if key.startswith("logger.") else []
        check_key(compose_config(CONF, "bench" if key.startswith(("train_step.", "what")) else "train", choices), key)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.threshold=1,abc,2", "attention.threshold must be a number, like 6.9, not 'abc'"),
        ("seed=choice(1,x)", "seed must be a whole number, like 0, not 'x'"),
        ("seed=range(0,1,0.5)", "seed must be a whole number, like 0, not 0.0"),
        ("attention=latte,lattte", "there is no attention=lattte; did you mean latte?"),
        ("attention=glob(x*)", "no attention matches glob(x*)"),
    ],
)
def test_each_value_of_a_sweep_is_checked(override: str, message: str) -> None:
    assert message in refused("train", override)


@pytest.mark.parametrize(
    "override",
    ["seed=range(3)", "attention.threshold=range(0,1,0.5)", "attention.threshold=interval(0,1)", "seed=shuffle(1,2)"],
)
def test_ranges_of_the_right_type_are_let_through(override: str) -> None:
    check(CONF, "train", [override])


OURS = ("model=transformer", "data=shakespeare", "task=language_modeling")


def test_a_mechanism_for_a_place_is_a_choice_with_keys_of_its_own() -> None:
    given = [*OURS, "attention@model.cross=topk", "model.cross.keys=8"]
    check(CONF, "train", given)
    config = compose_config(CONF, "train", given)
    assert config.model.cross._target_.endswith("TopK")
    assert config.model.cross["keys"] == 8
    assert config.attention._target_.endswith("Latte")
    assert config.model.encoder is None
    check(CONF, "train", [*OURS, "attention@model.encoder=latte,dense", "model.encoder.gate.tau=1"])
    check(CONF, "train", ["experiment=shakespeare_denoising", "attention@model.decoder=dense", "model.cross=null"])


def test_every_place_of_the_configs_can_be_chosen_for() -> None:
    found = list_places(CONF)
    assert {"attention@model.encoder", "attention@model.decoder", "attention@model.cross"} <= found.keys()
    for place, choice in found.items():
        node = compose_config(CONF, "train", [choice, f"{place}=dense"])
        assert node.model[place.rpartition(".")[2]]._target_.endswith("Dense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention.cross=topk"], "attention.cross is not a choice of attention; write attention@model.cross=topk"),
        ([*OURS, "model.cross=topk"], "model.cross is not a choice of attention; write attention@model.cross=topk"),
        (
            ["attention.encoder.tau=2"],
            "attention.encoder.tau is not a key; write attention@model.encoder=... model.enc",
        ),
        ([*OURS, "+attention@model.cross=topk"], "attention@model.cross needs no +: attention@model.cross=topk"),
        ([*OURS, "attention@model.cross=topkk"], "there is no attention=topkk; did you mean topk?"),
        ([*OURS, "attention@model.cros=topk"], "has no place attention@model.cros; did you mean attention@model.cross"),
        (
            ["attention@model.cross=topk"],
            "model=vit has no place attention@model.cross. Available: attention@model.enc",
        ),
        ([*OURS, "attention@model.cross=topk", "model.cross.key=8"], "model.cross has no key 'key'; did you mean keys"),
        (["attention.bits=4"], "attention has no key 'bits'; did you mean attention.estimate.bits?"),
        (["max_epochs=3"], "the config has no key 'max_epochs'; did you mean trainer.max_epochs?"),
        (["trainer.gpu=1"], "trainer.gpu is not a key; gpu is a choice: write trainer=gpu"),
        (
            ["attention=local"],
            "no attention=local. Available: blocks, dense, latte, mca, mean, none, smyrf, topk, yoso. A choice",
        ),
        (["attention=local"], "A choice of your own is a file conf/attention/local.yaml, see docs/adding.md"),
        (["attention.gate.surogate=inside"], "attention.gate has no key 'surogate'; did you mean surrogate?"),
    ],
    ids=str,
)
def test_another_way_to_choose_for_a_place_is_refused_with_the_right_one(arguments: list[str], message: str) -> None:
    assert message in refused("train", *arguments)


def test_choices_by_pattern_are_those_that_hydra_takes() -> None:
    (override,) = parse(["attention=glob([l*,m*],exclude=mean)"])
    assert list_chosen(CONF, override) == ["latte", "mca"]
    check(CONF, "train", ["attention=glob(*)", "seed=0,1"])


def test_nothing_heavy_is_imported_for_it() -> None:
    code = (
        "import sys; from pathlib import Path; from thresher.config import overrides\n"
        "try: overrides.check(Path(sys.argv[1]), 'train', ['seed=abc'])\n"
        "except ValueError: sys.exit(bool({'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)))\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(CONF)]).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks=null", r"write callbacks=none for none\. Available: default, ema, none"),
        ("~callbacks", "write callbacks=none for none"),
        ("logger=null", "write logger=none for none"),
        ("compute=null", "write compute=free for none"),
        ("scheduler=null", "write scheduler=constant for none"),
        ("experiment=null", "experiment takes the name of a choice; leave it out for none"),
        *((f"{group}=null", "every command needs one") for group in ("trainer", "model", "data", "task", "attention")),
        ("~optimizer", "every command needs one"),
        ("attention@model.cross=null", "leave it out for none"),
        ("run=null", "run holds entries by name, and cannot be null"),
        ("~run.dir", r"run\.dir cannot be deleted"),
        ("~seed", "seed cannot be deleted"),
    ],
)
def test_what_every_command_needs_cannot_be_taken_away(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(CONF, "train", [override])


@pytest.mark.parametrize("override", ["~callbacks.progress", "callbacks.progress=null", "logger.csv=null", "~debug"])
def test_what_a_command_can_do_without_may_be_taken_away(override: str) -> None:
    check(CONF, "train", [override])


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("ckpt=runs/epoch=3-step=10.ckpt", "\"ckpt='runs/epoch=3-step=10.ckpt'\""),
        ("data.root=/a=b/c, d", "\"data.root='/a=b/c, d'\""),
        ("run.name=ü", "\"run.name='ü'\""),
        ("init_from=a$b=(c).ckpt", "'init_from='\"'\"'a$b=(c).ckpt'\"'\"''"),
        ("attention.threshold 1", "write key=value"),
    ],
)
def test_a_value_that_needs_quotes_is_answered_with_them(argument: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(meant)):
        parse([argument])
    if meant != "write key=value":
        (parsed,) = parse(shlex.split(meant))
        assert f"{parsed.key_or_group}={parsed.value()}" == argument
