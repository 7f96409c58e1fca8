"""The rows of a benchmark: every contender at every setting, pattern and length."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thresher.attention import hyperparameters
from thresher.attention.contract import Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import check_choice, flatten_options, nest_options
from thresher.config import overrides
from thresher.tools.bench.jobs import (
    AUTO,
    REFERENCE,
    Job,
    Scene,
    build_mechanism,
    find_backends,
    load_mechanism_class,
    select_backends,
)
from thresher.tools.bench.peers import PEERS

PATTERNS = [pattern.name.lower() for pattern in Pattern]
USUAL_PATTERNS = ["noncausal_self", "causal_self"]
USUAL_LENGTHS = [512, 1024, 2048]
OWN = ("kept", "n")  # knobs that are no hyper-parameters
ALL = "all"  # backends that a mechanism has, each in a row of its own
STEP_DTYPES = ("float32", "bfloat16")
MODELS = {"gpt": "causal_self", "vit": "noncausal_self"}


def as_list(value: Any) -> list[Any]:
    """Return one value or several as a list."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(plain) if isinstance(plain, list) else [plain]


def find_mechanisms(conf: Path, wanted: Any) -> list[str]:
    """Find the names of the mechanisms to time.

    Raises:
        ValueError: One is in no file of `conf/attention`; the message names the nearest.
    """
    if wanted is not None:
        for name in as_list(wanted):
            overrides.check_choice(conf, "attention", str(name))
        return [str(name) for name in as_list(wanted)]
    names = sorted(path.stem for path in (conf / "attention").glob("*.yaml"))
    classes = {name: load_mechanism_class(read_attention_config(conf, name)["_target_"]) for name in names}
    return [name for name, cls in classes.items() if cls.content_based and cls.dense_limit != {}]


def read_attention_config(conf: Path, name: str) -> dict[str, Any]:
    """Read the config of a mechanism."""
    config: Any = OmegaConf.to_container(OmegaConf.load(conf / "attention" / f"{name}.yaml"))
    return config


def expand_settings(cfg: DictConfig, name: str, known: Sequence[str]) -> list[dict[str, Any]]:
    """Expand the `settings` of a contender to every combination of their values; `n` stays a list.

    Raises:
        ValueError: The contender has no such hyper-parameter; the message names the nearest.
    """
    given: Any = OmegaConf.to_container(cfg.settings).get(name) or {}  # type: ignore[union-attr]
    knobs = flatten_options(given)
    shown = OmegaConf.create({"settings": {name: nest_options(dict.fromkeys([*known, *OWN]))}})
    for knob in knobs:
        overrides.check_key(shown, f"settings.{name}.{knob}")
    lengths = {"n": as_list(knobs.pop("n"))} if knobs.get("n") is not None else {}
    values = itertools.product(*(as_list(value) for value in knobs.values()))
    return [dict(zip(knobs, each, strict=True)) | lengths for each in values]


def check_settings(cfg: DictConfig, conf: Path) -> None:
    """Raise a ValueError where `settings` names neither a mechanism nor a peer."""
    for name in cfg.settings:
        if name not in PEERS:
            overrides.check_choice(conf, "attention", str(name))


def build_attention_jobs(cfg: DictConfig, conf: Path, scene: Scene, recorded: Mapping[str, Any] | None) -> list[Job]:
    """Build the jobs of attention alone.

    Args:
        cfg: The config of bench.
        conf: The folder of configs.
        scene: What all rows share.
        recorded: Lengths by pattern and the attention's config of recorded inputs; None for random ones.

    Raises:
        ValueError: A name, a hyper-parameter or a length is wrong.
    """
    lengths = {} if recorded is None else recorded["lengths"]
    for pattern in [] if cfg.patterns is None else as_list(cfg.patterns):
        check_choice("patterns", pattern, list(lengths) or PATTERNS)
    patterns = as_list(cfg.patterns) if cfg.patterns is not None else list(lengths) or USUAL_PATTERNS
    jobs = []
    for job, own_lengths in _build_contenders(cfg, conf, scene.device, recorded):
        for pattern in patterns:
            wanted = own_lengths or (as_list(cfg.n) if cfg.n is not None else None)
            for n in wanted or ([lengths[pattern]] if lengths else USUAL_LENGTHS):
                _check_length("n", n)
                if n > lengths.get(pattern, n):
                    raise ValueError(
                        f"n={n}: the recorded {pattern} attention has {lengths[pattern]} tokens, and is cropped "
                        "but never repeated"
                    )
                jobs.append(replace(job, pattern=pattern, n=n))
    return select_buildable(jobs, scene)


def build_decode_jobs(cfg: DictConfig, conf: Path, scene: Scene) -> list[Job]:
    """Build the jobs of single decoding steps.

    Raises:
        ValueError: A length is not a number of tokens, or no mechanism can decode.
    """
    lengths = as_list(cfg.decode.n)
    for n in lengths:
        _check_length("decode.n", n)
    jobs = [
        replace(job, pattern="causal_self", n=n, model="decode")
        for job, _ in _build_contenders(cfg, conf, scene.device, None)
        if job.target is not None and not load_mechanism_class(job.target).needs_source
        for n in lengths
    ]
    return select_buildable(jobs, scene)


def build_step_jobs(cfg: DictConfig, conf: Path, scene: Scene) -> list[Job]:
    """Build the jobs of whole training steps."""
    if scene.dtype not in STEP_DTYPES:
        raise ValueError(f"what=train_step trains in {' or '.join(STEP_DTYPES)}, not in {scene.dtype}")
    jobs = []
    for model, pattern in MODELS.items():
        sizes: Any = OmegaConf.to_container(cfg.train_step[model])
        lengths = as_list(sizes.pop("n"))
        for job, _ in _build_contenders(cfg, conf, scene.device, None):
            if job.target is not None:
                jobs += [replace(job, pattern=pattern, n=n, model=model, sizes=sizes) for n in lengths]
    return select_buildable(jobs, scene)


def select_buildable(jobs: Sequence[Job], scene: Scene) -> list[Job]:
    """Select the jobs whose pattern the contender supports; anything else that it refuses is an error.

    Raises:
        ValueError: A hyper-parameter is wrong, or no job is left.
    """
    kept = []
    for job in jobs:
        pattern = Pattern[job.pattern.upper()]
        supports = PEERS[job.name].supports if job.target is None else load_mechanism_class(job.target).supports
        if pattern in supports:
            if job.target is not None:
                build_mechanism(job, 1, scene.head_dim)
            kept.append(job)
    if not kept:
        raise ValueError("nothing to time: none of these mechanisms supports any of these patterns")
    return kept


def choose_backends(name: str, cls: type[Mechanism], wanted: Any, device: str) -> list[str | None]:
    """Choose the backends to time a mechanism on; [None] for one without the argument `backend`.

    "all" are those that the device can run.

    Raises:
        ValueError: It has none of those named.
    """
    has = find_backends(cls)
    if not has:
        if wanted is not None and not {REFERENCE, AUTO, ALL} & set(as_list(wanted)):
            raise ValueError(
                f"backends={wanted}: {name} has no other backend than its reference; add reference, or leave "
                f"{name} out of mechanisms"
            )
        return [None]
    if wanted is None:
        return [str(hyperparameters(cls)["backend"])]
    for backend in as_list(wanted):
        check_choice(f"backends of {name}", backend, (ALL, AUTO, *has))
    if ALL in as_list(wanted):
        return list(select_backends(cls, device))
    return as_list(wanted)


def describe_absent_peers() -> list[str]:
    """Describe how to install missing peers."""
    return [f"{name}: not installed: pip install {peer.package}" for name, peer in PEERS.items() if not peer.installed]


def _build_contenders(
    cfg: DictConfig, conf: Path, device: str, recorded: Mapping[str, Any] | None
) -> Iterator[tuple[Job, list[int] | None]]:
    """Yield contenders at each setting and backend, and their own lengths, if they have any."""
    for name in find_mechanisms(conf, cfg.mechanisms):
        config = read_attention_config(conf, name)
        if recorded is not None and recorded["attention"]["_target_"] == config["_target_"]:
            config = dict(recorded["attention"])
        usual = flatten_options({key: value for key, value in config.items() if not key.startswith("_")})
        cls = load_mechanism_class(config["_target_"])
        for setting in expand_settings(cfg, name, list(usual)):
            own_lengths, kept = setting.pop("n", None), setting.pop("kept", None)
            backends = choose_backends(name, cls, setting.pop("backend", cfg.backends), device)
            hyper = {key: value for key, value in (usual | setting).items() if key != "backend"}
            shown = ({} if kept is None else {"kept": kept}) | setting
            for backend in backends:
                yield (
                    Job(name, config["_target_"], nest_options(hyper), kept, _format_knobs(shown), backend, "", 0),
                    own_lengths,
                )
    for name, peer in PEERS.items() if cfg.peers else ():
        if peer.installed:
            for setting in expand_settings(cfg, name, list(peer.defaults)):
                own_lengths = setting.pop("n", None)
                yield Job(name, None, peer.defaults | setting, None, _format_knobs(setting), None, "", 0), own_lengths


def _check_length(name: str, n: Any) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} is a number of tokens, at least 1; got {n}")


def _format_knobs(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in knobs.items())
