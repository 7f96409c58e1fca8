"""Files from strangers: nothing of them runs, is imported, read or written, and each is answered by one message."""

import ast
import copy
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import thresher
from tests.running import CONF, run_dropin, run_eval, tiny_config
from thresher.checkpoints.format import GROUPS
from thresher.checkpoints.groups import list_choices, restore_config
from thresher.run import train as training
from thresher.run.overrides import load_with_overrides
from thresher.tools.export.run import export

Harm = Callable[[Callable[[dict[str, Any]], None]], Path]
SOURCE = Path(thresher.__file__).parent


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that every gadget would write; a module `gadget` writes it when it is imported."""
    path = tmp_path / "marker"
    (tmp_path / "gadget.py").write_text(
        f"from pathlib import Path\nPath({str(path)!r}).touch()\ndef run(*a, **k):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists(), "the gadget ran"


def gadgets(marker: Path) -> list[dict[str, Any]]:
    return [
        {"_target_": "gadget.run"},
        {"_target_": "torch.load", "f": "bomb.pt", "weights_only": False},
        {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "run", "source": "local"},
        {"_target_": "torch.utils.cpp_extension.load", "name": "x", "sources": ["x.cpp"]},
        {"_target_": "numpy.load", "file": "bomb.npy", "allow_pickle": True},
        {"_target_": "builtins.open", "file": str(marker), "mode": "w"},
        {"_target_": "builtins.open", "_args_": [str(marker), "w"]},
        {"_target_": "pathlib.Path.write_text", "self": str(marker), "data": "x"},
        {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(marker)]}]},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "gadget.run"}},
        {"_target_": "hydra._internal.instantiate._instantiate2.instantiate", "config": {"_target_": "gadget.run"}},
        {"_target_": "os.system", "command": f"touch {marker}"},
        {"_target_": ["gadget.run"]},
        {"_target_": {"_target_": "gadget.run"}},
        # Ours, but none of them belongs there.
        {"name": "default", "arguments": {"heads": {"path": str(marker)}}},
        {"name": "csv", "arguments": {"csv": {"save_dir": str(marker)}}},
        {"name": {"_target_": "gadget.run"}, "arguments": {}},
        {"name": "../../gadget", "arguments": {}},
        {"name": "vit", "arguments": {"_target_": "gadget.run"}},
        {"name": "latte", "arguments": {"tau": {"_target_": "gadget.run"}}},
        {"_target_": "thresher.callbacks.heads.HeadStatistics", "path": str(marker)},
        {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(marker)},
        {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "dirpath": str(marker)},
    ]


def targeting(gadget: Any) -> Any:
    """Return a gadget as a node that Hydra would instantiate, where plain arguments are allowed."""
    return gadget if "_target_" in gadget else {"_target_": "gadget.run", **gadget}


PLACES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "model": lambda config, gadget: config.update(model=gadget),
    "attention": lambda config, gadget: config.update(attention=gadget),
    "model.attention": lambda config, gadget: config["model"]["arguments"].update(attention=gadget),
    "model.where": lambda config, gadget: config["model"]["arguments"].update(where=targeting(gadget)),
    "optimizer.lr": lambda config, gadget: config["optimizer"]["arguments"].update(lr=targeting(gadget)),
    "trainer.plugins": lambda config, gadget: config["trainer"]["arguments"].update(plugins=[targeting(gadget)]),
    "data.root": lambda config, gadget: config["data"]["arguments"].update(root={"deep": [[targeting(gadget)]]}),
    "callbacks": lambda config, gadget: config.update(callbacks={"x": gadget}),
    "seed": lambda config, gadget: config.update(seed=targeting(gadget)),
    "unknown": lambda config, gadget: config.update(unknown=({"x": gadget},)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stored_config_runs_nothing_but_what_our_own_names_there(
    place: str, plain: dict[str, Any], marker: Path
) -> None:
    for gadget in gadgets(marker):
        config = copy.deepcopy(plain["thresher"]["config"])
        PLACES[place](config, gadget)
        with pytest.raises(ValueError, match="refused"):
            restore_config(config, CONF, "stranger.ckpt")


@pytest.mark.parametrize("which", range(23))
def test_every_way_into_a_checkpoint_checks_it(which: int, harmed: Harm, marker: Path) -> None:
    path = harmed(lambda c: c["thresher"]["config"].update(model=gadgets(marker)[which]))
    for use in (
        lambda: thresher.load_model(path),
        lambda: run_eval([f"ckpt='{path}'"], CONF),
        lambda: export(path, None, "safetensors"),
        lambda: run_dropin(["experiment=dropin_vit", f"ckpt='{path}'"], CONF),
    ):
        with pytest.raises(ValueError, match="refused"):
            use()


def test_a_name_of_ours_is_refused_in_another_group(plain: dict[str, Any]) -> None:
    for group in GROUPS:
        known = set(list_choices(CONF, group))
        others = {name for other in GROUPS for name in list_choices(CONF, other)} - known
        for other in sorted(others)[::5]:
            config = copy.deepcopy(plain["thresher"]["config"])
            config[group]["name"] = other
            with pytest.raises(ValueError, match=re.escape(f"asks for {group} {other!r}")):
                restore_config(config, CONF, "stranger.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["data"]["arguments"].update(root="${oc.env:HOME}"),
        lambda config: config["run"].update(name="${oc.decode:x}"),
        lambda config: config["model"]["arguments"].update(_args_=["x"]),
        lambda config: config["model"].update({"_target_": "gadget.run", "_partial_": True}),
        lambda config: config["model"]["arguments"].update({"_target_": "gadget.run", "_partial_": True}),
        lambda config: config.pop("model"),
        lambda config: config.update(attention="latte"),
        lambda config: config.update(trainer=None),
        lambda config: config["data"]["arguments"].update(root=torch.zeros(2)),
    ],
    ids=["env", "decode", "args", "target", "partial", "no model", "attention a word", "no trainer", "tensor"],
)
def test_other_tricks_of_a_config_are_refused(change: Callable[[dict[str, Any]], None], harmed: Harm) -> None:
    path = harmed(lambda c: change(c["thresher"]["config"]))
    with pytest.raises(ValueError, match="refused"):
        run_eval([f"ckpt='{path}'"], CONF)


def test_a_config_without_end_is_refused(plain: dict[str, Any]) -> None:
    deep: list[Any] = []
    wide: list[Any] = ["x"]
    for _ in range(5000):
        deep = [deep]
    for _ in range(30):
        wide = [wide, wide]
    for bomb in (deep, wide):
        with pytest.raises(ValueError, match="levels"):
            restore_config(plain["thresher"]["config"] | {"seed": bomb}, CONF, "stranger.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(state_dict=[]),
        lambda c: c["state_dict"].update({"net.head.weight": "text"}),
        lambda c: c["state_dict"].update({3: torch.zeros(1)}),
        lambda c: c["state_dict"].pop("net.head.weight"),
        lambda c: c["state_dict"].update({"net.head.weight": torch.zeros(1).expand(10**12)}),
        lambda c: c["thresher"].update(classes=[1, 2]),
        lambda c: c["thresher"].update(config=[]),
        lambda c: c["thresher"].update(model_arguments=None),
        lambda c: c["thresher"].update(model_arguments={"num_classes": "x", "channels": 1, "image_size": 28}),
        lambda c: c["thresher"]["config"]["model"]["arguments"].update(checkpoint_path="bomb.pt"),
        lambda c: c["thresher"]["config"]["model"]["arguments"].update(name="hf-hub:someone/something"),
        lambda c: c["thresher"]["config"]["model"]["arguments"].update(embed_dim=[1]),
    ],
    ids=range(12),
)
def test_a_checkpoint_that_is_none_is_one_clear_error(change: Callable[[dict[str, Any]], None], harmed: Harm) -> None:
    named = r"stranger\.ckpt|does not fit|checkpoint_path|timm has no|timm's|model\.embed_dim must"
    with pytest.raises(ValueError, match=named):
        thresher.load_model(harmed(change))


class Bomb:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_never_run_whatever_the_environment_says(
    zipped: bool, trained: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "bomb.ckpt"
    stored: Any = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    for place in ("hyper_parameters", "callbacks"):
        torch.save(stored | {place: Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
        for use in (
            lambda: thresher.load_model(path),
            lambda: run_eval([f"ckpt='{path}'"], CONF),
            partial(training.train, tiny_config(tmp_path / f"a_{place}", f"init_from='{path}'", "compute=free")),
            partial(training.train, tiny_config(tmp_path / f"b_{place}", f"ckpt_path='{path}'", "train=false")),
        ):
            with pytest.raises(ValueError, match=r"bomb\.ckpt cannot be read as weights"):
                use()
    with pytest.raises(Exception, match=r"(?i)weights"):
        training.train(tiny_config(tmp_path / "c", f"resume='{path}'"))


def test_lightnings_instantiator_is_not_followed(harmed: Harm, tmp_path: Path) -> None:
    path = harmed(lambda c: c.update(hyper_parameters={"_instantiator": "gadget.run", "_class_path": "gadget.run"}))
    thresher.load_model(path)
    run_eval([f"ckpt='{path}'", "trainer.limit_test_batches=1", f"run.dir='{tmp_path}/eval'"], CONF)


def test_a_compressed_archive_is_refused(harmed: Harm, tmp_path: Path) -> None:
    path, packed = harmed(lambda c: None), tmp_path / "packed.ckpt"
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in one.infolist():
            other.writestr(entry.filename, one.read(entry))
    with pytest.raises(ValueError, match="compressed"):
        thresher.load_model(packed)


def test_evaluating_a_strangers_checkpoint_downloads_and_writes_nothing(harmed: Harm, tmp_path: Path) -> None:
    def ask(name: str, **changes: Any) -> DictConfig:
        path = harmed(lambda c: c["thresher"]["config"].update(data={"name": name, "arguments": changes}))
        return load_with_overrides(path, [], CONF).config.data

    assert ask("cifar10", download=True, root=str(tmp_path)).download is False
    elsewhere = tmp_path / "elsewhere"
    assert ask("listops", root=str(elsewhere)).root == OmegaConf.load(CONF / "data" / "listops.yaml").root
    elsewhere.mkdir()
    assert ask("listops", root=str(elsewhere)).root == str(elsewhere)


def test_models_of_transformers_name_no_code(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from thresher.attention.dense import Dense
    from thresher.models.huggingface import huggingface_model

    size = {"vocabulary": 260, "length": 8, "padding": 0, "num_classes": 2}
    for entry in ("_attn_implementation", "attn_implementation", "auto_map"):
        with pytest.raises(ValueError, match=f"{entry}|has no entry"):
            huggingface_model(attention=Dense, config={entry: "someone/kernels"}, **size)
    folder = tmp_path / "model"
    transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "gadget.py").write_text((tmp_path / "gadget.py").read_text())
    for change in (
        {"model_type": "unknown", "auto_map": {"AutoConfig": "gadget.run"}},
        {"_attn_implementation": "someone/kernels"},
        {"attn_implementation": "someone/kernels"},
    ):
        (folder / "config.json").write_text(json.dumps(plain | change))
        with pytest.raises((ValueError, FileNotFoundError), match=r"there is no model|from the hub"):
            huggingface_model(attention=Dense, name_or_path=str(folder), **size)


# Exports


@pytest.mark.parametrize("place", PLACES)
def test_an_export_is_believed_no_more_than_a_checkpoint(place: str, exported: Path, marker: Path) -> None:
    path = exported / "config.json"
    plain = path.read_text()
    try:
        for gadget in gadgets(marker)[::4]:
            record = json.loads(plain)
            PLACES[place](record["config"], gadget)
            path.write_text(json.dumps(record))
            with pytest.raises(ValueError, match="refused"):
                thresher.load_model(exported)
    finally:
        path.write_text(plain)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{" * 100_000, "[" * 100_000, '{"config": 1, "classes": 2}', "\0"])
def test_a_damaged_description_is_one_clear_error(content: str, exported: Path) -> None:
    path = exported / "config.json"
    plain = path.read_text()
    try:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json|class names"):
            thresher.load_model(exported)
    finally:
        path.write_text(plain)


def test_damaged_weights_are_one_clear_error(exported: Path) -> None:
    path = exported / "model.safetensors"
    plain = path.read_bytes()
    try:
        for damaged in (b"", plain[:4], plain[:100], plain[:-1], b"\xff" * 8 + plain[8:], b"{}" + plain):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
                thresher.load_model(exported)
    finally:
        path.write_bytes(plain)


# Our own code


UNSAFE = {"load", "loads", "Unpickler", "unsafe_load", "full_load", "extractall", "eval", "exec", "system", "popen"}
OWN = {"json.loads", "OmegaConf.load", "load", "checkpoint.load"} | {
    "self.source.load",  # of images
    "tl.load",  # of triton, from the memory of a GPU
}


def test_nothing_of_ours_unpickles() -> None:
    """Whoever reads with torch, numpy, yaml or pickle says that code is not to run; every such call is looked at."""
    root = SOURCE.parents[1]
    found = set()
    for path in [*SOURCE.rglob("*.py"), root / "train.py", root / "eval.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}: {called}"
            if called == "torch.load":
                assert options.get("weights_only") == "True", where
            elif called in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", where
            elif called == "yaml.load":
                assert options.get("Loader") == "LOADER", where
            elif called.endswith(".fit") and "ckpt_path" in options:
                assert options.get("weights_only") == "True", where
            elif called.endswith("from_pretrained") and called.startswith("Auto"):
                assert options.get("trust_remote_code") == "False", where
            elif called.rpartition(".")[2] in UNSAFE and called not in OWN:
                found.add(where)
    harmless = {where for where in found if where.endswith(".eval")}  # of modules
    assert found - harmless == {
        "archives.py: _ArraysOnly(io.BytesIO(data), encoding='latin1').load",
        "programs.py: torch.export.load",  # of the file that it has just written
    }


def test_the_loader_of_yaml_is_the_safe_one() -> None:
    import yaml

    from thresher.results.configs import LOADER

    assert issubclass(LOADER, (yaml.SafeLoader, yaml.CSafeLoader))


def test_no_environment_is_asked_for_by_configs_of_ours() -> None:
    assert not [path for path in CONF.rglob("*.yaml") if "${oc." in path.read_text()]
