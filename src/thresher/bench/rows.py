"""Which rows there are: every contender at every setting, in every pattern, at every length."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thresher import overrides
from thresher.attention import hyperparameters
from thresher.attention.base import Mechanism, Pattern
from thresher.attention.options import check_choice
from thresher.bench.jobs import AUTO, REFERENCE, Job, Scene, backends_of, build, mechanism_class
from thresher.bench.peers import PEERS

PATTERNS = [pattern.name.lower() for pattern in Pattern]
USUAL_PATTERNS = ["noncausal_self", "causal_self"]
USUAL_LENGTHS = [512, 1024, 2048]
OWN = ("kept", "n")  # knobs that are no hyper-parameters
ALL = "all"  # backends that a mechanism has, each in a row of its own
STEP_DTYPES = ("float32", "bfloat16")
MODELS = {"gpt": "causal_self", "vit": "noncausal_self"}


def listed(value: Any) -> list[Any]:
    """Return one or several values as several."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(plain) if isinstance(plain, list) else [plain]


def mechanisms_of(conf: Path, wanted: Any) -> list[str]:
    """Return the names of the mechanisms to time.

    Raises:
        ValueError: One is in no file of `conf/attention`; the message names the nearest.
    """
    if wanted is not None:
        for name in listed(wanted):
            overrides.check_choice(conf, "attention", str(name))
        return [str(name) for name in listed(wanted)]
    names = sorted(path.stem for path in (conf / "attention").glob("*.yaml"))
    classes = {name: mechanism_class(attention_config(conf, name)["_target_"]) for name in names}
    return [name for name, cls in classes.items() if cls.content_based and cls.dense_limit != {}]


def attention_config(conf: Path, name: str) -> dict[str, Any]:
    """Return what conf/attention says of a mechanism."""
    config: Any = OmegaConf.to_container(OmegaConf.load(conf / "attention" / f"{name}.yaml"))
    return config


def settings_of(cfg: DictConfig, name: str, known: Sequence[str]) -> list[dict[str, Any]]:
    """Return every combination of what `bench.settings` lists for a contender; `n` stays a list.

    Raises:
        ValueError: It has no such hyper-parameter; the message names the nearest.
    """
    knobs: Any = OmegaConf.to_container(cfg.settings).get(name) or {}  # type: ignore[union-attr]
    shown = OmegaConf.create({"bench": {"settings": {name: dict.fromkeys([*known, *OWN])}}})
    for knob in knobs:
        overrides.check_key(shown, f"bench.settings.{name}.{knob}")
    lengths = {"n": listed(knobs.pop("n"))} if knobs.get("n") is not None else {}
    values = itertools.product(*(listed(value) for value in knobs.values()))
    return [dict(zip(knobs, each, strict=True)) | lengths for each in values]


def check_settings(cfg: DictConfig, conf: Path) -> None:
    """Raise a ValueError where `bench.settings` speaks of something that is neither a mechanism nor a peer."""
    for name in cfg.settings:
        if name not in PEERS:
            overrides.check_choice(conf, "attention", str(name))


def attention_jobs(cfg: DictConfig, conf: Path, scene: Scene, recorded: Mapping[str, Any] | None) -> list[Job]:
    """Return the rows of attention alone.

    Args:
        cfg: The node `bench` of the config.
        conf: The folder of configs.
        scene: What all rows share.
        recorded: What is known of recorded inputs: their lengths by pattern, and the attention that they come from.

    Raises:
        ValueError: A name, a hyper-parameter or a length cannot be.
    """
    lengths = {} if recorded is None else recorded["lengths"]
    for pattern in [] if cfg.patterns is None else listed(cfg.patterns):
        check_choice("bench.patterns", pattern, list(lengths) or PATTERNS)
    patterns = listed(cfg.patterns) if cfg.patterns is not None else list(lengths) or USUAL_PATTERNS
    jobs = []
    for job, own_lengths in _contenders(cfg, conf, recorded):
        for pattern in patterns:
            wanted = own_lengths or (listed(cfg.n) if cfg.n is not None else None)
            for n in wanted or ([lengths[pattern]] if lengths else USUAL_LENGTHS):
                _check_length("bench.n", n)
                if n > lengths.get(pattern, n):
                    raise ValueError(
                        f"bench.n={n}: the recorded {pattern} attention has {lengths[pattern]} tokens, and is cropped "
                        "but never repeated"
                    )
                jobs.append(replace(job, pattern=pattern, n=n))
    return buildable(jobs, scene)


def decode_jobs(cfg: DictConfig, conf: Path, scene: Scene) -> list[Job]:
    """Return the rows of single steps of decoding.

    Raises:
        ValueError: A length is no number of tokens, or no mechanism can decode.
    """
    lengths = listed(cfg.decode.n)
    for n in lengths:
        _check_length("bench.decode.n", n)
    jobs = [
        replace(job, pattern="causal_self", n=n, model="decode")
        for job, _ in _contenders(cfg, conf, None)
        if job.target is not None and not mechanism_class(job.target).needs_source
        for n in lengths
    ]
    return buildable(jobs, scene)


def step_jobs(cfg: DictConfig, conf: Path, scene: Scene) -> list[Job]:
    """Return the rows of whole training steps."""
    if scene.dtype not in STEP_DTYPES:
        raise ValueError(f"bench.what=train_step trains in {' or '.join(STEP_DTYPES)}, not in {scene.dtype}")
    jobs = []
    for model, pattern in MODELS.items():
        sizes: Any = OmegaConf.to_container(cfg.train_step[model])
        lengths = listed(sizes.pop("n"))
        for job, _ in _contenders(cfg, conf, None):
            if job.target is not None:
                jobs += [replace(job, pattern=pattern, n=n, model=model, sizes=sizes) for n in lengths]
    return buildable(jobs, scene)


def buildable(jobs: Sequence[Job], scene: Scene) -> list[Job]:
    """Leave out patterns that a contender is not for; whatever else it refuses is an error.

    Raises:
        ValueError: A hyper-parameter cannot be, or nothing is left.
    """
    kept = []
    for job in jobs:
        pattern = Pattern[job.pattern.upper()]
        supports = PEERS[job.name].supports if job.target is None else mechanism_class(job.target).supports
        if pattern in supports:
            if job.target is not None:
                build(job, 1, scene.head_dim)
            kept.append(job)
    if not kept:
        raise ValueError("nothing to time: none of these mechanisms supports any of these patterns")
    return kept


def wanted_backends(name: str, cls: type[Mechanism], wanted: Any) -> list[str | None]:
    """Return the backends to time a mechanism on; [None] for one that has its reference alone.

    Raises:
        ValueError: It has none of those wanted.
    """
    has = backends_of(cls)
    if not has:
        if wanted is not None and not {REFERENCE, AUTO, ALL} & set(listed(wanted)):
            raise ValueError(
                f"bench.backends={wanted}: {name} has no other backend than its reference; add reference, or leave "
                f"{name} out of bench.mechanisms"
            )
        return [None]
    if wanted is None:
        return [str(hyperparameters(cls)["backend"])]
    for backend in listed(wanted):
        check_choice(f"bench.backends of {name}", backend, (ALL, AUTO, *has))
    return list(has) if ALL in listed(wanted) else listed(wanted)


def absent_peers() -> list[str]:
    """Return what to install for the peers that are not."""
    return [f"{name}: not installed: pip install {peer.package}" for name, peer in PEERS.items() if not peer.installed]


def _contenders(
    cfg: DictConfig, conf: Path, recorded: Mapping[str, Any] | None
) -> Iterator[tuple[Job, list[int] | None]]:
    """Yield contenders at each setting and backend, and the lengths that are theirs alone."""
    for name in mechanisms_of(conf, cfg.mechanisms):
        config = attention_config(conf, name)
        if recorded is not None and recorded["attention"]["_target_"] == config["_target_"]:
            config = dict(recorded["attention"])
        usual = {key: value for key, value in config.items() if not key.startswith("_")}
        cls = mechanism_class(config["_target_"])
        for setting in settings_of(cfg, name, list(usual)):
            own_lengths, kept = setting.pop("n", None), setting.pop("kept", None)
            backends = wanted_backends(name, cls, setting.pop("backend", cfg.backends))
            hyper = {key: value for key, value in (usual | setting).items() if key != "backend"}
            shown = ({} if kept is None else {"kept": kept}) | setting
            for backend in backends:
                yield Job(name, config["_target_"], hyper, kept, _words(shown), backend, "", 0), own_lengths
    for name, peer in PEERS.items() if cfg.peers else ():
        if peer.installed:
            for setting in settings_of(cfg, name, list(peer.defaults)):
                own_lengths = setting.pop("n", None)
                yield Job(name, None, peer.defaults | setting, None, _words(setting), None, "", 0), own_lengths


def _check_length(name: str, n: Any) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} counts tokens and must be a whole number of at least 1, got {n}")


def _words(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in knobs.items())
