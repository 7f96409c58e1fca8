"""Record what mechanisms and trainings compute, and compare a later tree with the record.

`python -m tests.golden record FILE` at the commit before a refactoring, `python -m tests.golden compare FILE` after
each step. The reference must agree bit for bit, kernels within rounding. `--train` adds short trainings, `--main` the
main job.
"""

import argparse
import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern, ValueSource, find, hyperparameters

ROOT = Path(__file__).parent.parent
B, H, GROUPS, D, M = 2, 4, 2, 8, 37
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "mean": [{}],
    "none": [{}],
    "topk": [{}, {"keys": 5, "chunk": 8}, {"keys": 1.0}],
    "latte": [
        {"theta": 0.5},
        {"theta": 0.5, "surrogate": "inside"},
        {"theta": 0.5, "surrogate": "compact", "est_bits": 8, "always_keep": 2},
        {"theta": 2.0, "unit": "nats", "surrogate": "compact", "split": "truncate"},
        {"theta": 2.0, "unit": "nats", "est_bits": "exact"},
        {"theta": 0.5, "scoring": "int8", "est_bits": 2},
        {"theta": 0.5, "mode": "soft", "tau": 0.3},
        {"theta": 0.5, "mode": "hard"},
        {"theta": 0.5, "gate_grad_to_scores": False, "surrogate": "inside"},
        {"theta": float("inf"), "est_bits": "exact", "trainable": False},
    ],
    "smyrf": [{}, {"cluster": 6, "rounds": 3, "dedup": "count"}, {"quantise": True, "width": 0.5, "resample": "never"}],
    "yoso": [
        {},
        {"dense_below": 0},
        {"dense_below": 0, "grad": "exact"},
        {"dense_below": 0, "hash": "hadamard", "bits": 3, "resample": "never"},
        {"expectation": True},
        {"conv": 3},
    ],
    "mca": [
        {},
        {"sampler": "poisson"},
        {"draws": "shared", "path": "gather"},
        {"grad": "exact", "reproduce_paper": True},
        {"alpha": 0.0},
        {"allow_noncausal_budget": True, "resample": "never", "seed": 3},
    ],
}
# Where options went, for trees in which they are nested: old name -> (group, name), or (None, name) if it was renamed.
NESTED: dict[str, dict[str, tuple[str | None, str]]] = {
    "latte": {
        "est_bits": ("estimate", "bits"),
        "split": ("estimate", "split"),
        "scoring": ("estimate", "scoring"),
        "mode": ("gate", "mode"),
        "surrogate": ("gate", "surrogate"),
        "tau": ("gate", "tau"),
        "gate_grad_to_scores": ("gate", "into_scores"),
        "theta": (None, "threshold"),
    },
    "yoso": {"hash": ("hash", "kind"), "bits": ("hash", "bits"), "resample": ("hash", "resample")},
    "mca": {
        "sampler": ("sampling", "distribution"),
        "draws": ("sampling", "draws"),
        "resample": ("sampling", "resample"),
        "seed": ("sampling", "seed"),
    },
}
DEFAULTS = {"latte": {"surrogate": "sigmoid"}}  # of the recorded tree, whatever the defaults are now


def options_of(name: str, flat: dict[str, Any]) -> dict[str, Any]:
    """Translate options of the recorded tree to those of this one."""
    parameters = inspect.signature(find(name)).parameters
    flat = DEFAULTS.get(name, {}) | flat
    options: dict[str, Any] = {}
    for key, value in flat.items():
        group, new = NESTED.get(name, {}).get(key, (None, key))
        if group is None:
            options[new if new in parameters else key] = value
        elif group in parameters and not isinstance(parameters[group].default, str):
            options.setdefault(group, {})[new] = value
        else:
            options[key] = value
    return options


def calls(name: str, pattern: Pattern, n: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(B, M, H * D, generator=random, dtype=dtype)
    weight = torch.randn(GROUPS * D, H * D, generator=random, dtype=dtype)
    source = ValueSource(x, weight, None) if find(name).needs_source else None
    lengths = torch.tensor([[M], [M - 9]])
    keys = torch.arange(M) < lengths
    queries = keys[:, M - n :] if not pattern.cross else torch.arange(n) < torch.tensor([[n], [n - 3]])
    pairs = torch.rand(B, 1, n, M, generator=random) < 0.6
    pairs[:, :, 0] = False  # a row without keys
    bias = torch.randn(1, H, n, M, generator=random, dtype=dtype)
    yield "plain", Call(source=source)
    yield "padded", Call(queries=queries if not pattern.cross else None, keys=keys, source=source)
    if n > 1:
        yield "both", Call(queries=queries, keys=keys, source=source)
    yield "left", Call(queries=queries.flip(-1), keys=keys.flip(-1), source=source)
    yield "empty", Call(keys=keys & torch.tensor([[True], [False]]), source=source)
    yield "pairs", Call(pairs=pairs, source=source)
    yield "bias", Call(bias=bias, keys=keys, queries=queries, source=source)


def value_weight(call: Call, dtype: torch.dtype) -> Tensor | None:
    if call.source is None:
        return None
    return (call.source.x @ call.source.weight.T).view(B, M, GROUPS, D).transpose(1, 2).to(dtype)


def one(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: Call, backward: bool) -> dict[str, Tensor] | str:
    torch.manual_seed(11)
    inputs = [x.clone().requires_grad_(backward) for x in (q, k, v)]
    mechanism.zero_grad()
    try:
        attended = mechanism(*inputs, call)
    except (ValueError, AssertionError) as error:
        return f"{type(error).__name__}"
    found = {"out": attended.out.detach(), **{f"cost.{k}": x.detach() for k, x in attended.cost._asdict().items()}}
    if backward:
        random = torch.Generator().manual_seed(12)
        loss = (attended.out * torch.randn(attended.out.shape, generator=random).to(attended.out)).sum()
        if attended.cost.total.requires_grad:
            loss = loss + attended.cost.total.sum() / 100
        loss.backward()
        grads = {key: x.grad for key, x in zip("qkv", inputs, strict=True)}
        grads |= {f"p.{key}": x.grad for key, x in mechanism.named_parameters()}
        found |= {f"grad.{key}": x.clone() for key, x in grads.items() if x is not None}
    return found


def mechanisms(only: list[str] | None) -> Iterator[tuple[str, dict[str, Tensor] | str]]:
    for name, variants in VARIANTS.items():
        if only and name not in only:
            continue
        for number, flat in enumerate(variants):
            backends = ["reference", "auto"] if "backend" in hyperparameters(find(name)) else [None]
            for pattern, backend in itertools.product(Pattern, backends):
                options = options_of(name, flat) | ({} if backend is None else {"backend": backend})
                try:
                    torch.manual_seed(3)
                    mechanism = find(name)(num_heads=H, head_dim=D, pattern=pattern, **options)
                except ValueError as error:
                    yield f"{name}.{number}/{pattern.name}/{backend}", type(error).__name__
                    continue
                dtypes = [torch.float32, torch.float64] + ([torch.bfloat16] if number == 0 else [])
                for dtype, n, groups in itertools.product(dtypes, (M, 11, 1), (H, GROUPS)):
                    if (n, groups) in ((11, H), (1, H)):
                        continue
                    random = torch.Generator().manual_seed(1)
                    q, k, v = (
                        torch.randn(B, heads, length, D, generator=random, dtype=torch.float64).to(dtype)
                        for heads, length in ((H, n), (groups, M), (groups, M))
                    )
                    for (kind, call), mode in itertools.product(
                        calls(name, pattern, n, dtype), ("train", "eval", "drop")
                    ):
                        if mode == "drop" and (not mechanism.drops_weights or kind != "padded"):
                            continue
                        if name == "mca" and groups != GROUPS:
                            continue
                        mechanism.dropout = 0.25 if mode == "drop" else 0.0
                        mechanism.train(mode != "eval")
                        given_v = value_weight(call, dtype)
                        key = f"{name}.{number}/{pattern.name}/{backend}/{dtype}/{n}/{groups}/{kind}/{mode}"
                        yield key, one(mechanism, q, k, v if given_v is None else given_v, call, mode != "eval")
            print(name, number, file=sys.stderr)


SHORT = ["debug=limit", "trainer.limit_train_batches=12", "seed=0", "threads=1"]
SIGMOID = ["attention.gate.surrogate=sigmoid"]  # the default of LATTE in the recorded tree
TRAININGS = {
    "classification": ["attention=latte"],
    "classification_topk": ["attention=topk"],
    "classification_smyrf": ["attention=smyrf"],
    "classification_mca": ["attention=mca"],
    "text": ["data=austen", "model=encoder", "task=text_classification"],
    "language": ["data=shakespeare", "model=transformer", "task=language_modeling"],
    "listops": ["attention=yoso", "data=listops", "model=encoder", "task=classification"],
}


def trained(overrides: list[str]) -> dict[str, float] | str:
    with tempfile.TemporaryDirectory() as folder:
        before = [] if any("attention" in o for o in overrides[:1]) and "latte" not in overrides[0] else SIGMOID
        command = [sys.executable, "train.py", f"run.dir={folder}/run", *overrides, *before]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENV, check=False)
        if done.returncode:
            return done.stderr[-2000:]
        metrics: dict[str, Any] = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        return {
            k: v for k, v in metrics.items() if isinstance(v, (int, float)) and "seconds" not in k and "/s" not in k
        }


def trainings(main: bool) -> Iterator[tuple[str, dict[str, float] | str]]:
    for name, overrides in TRAININGS.items():
        yield f"train/{name}", trained([*overrides, *(x for x in SHORT if "threads" not in x)])
    if main:
        yield "train/main", trained(["seed=0"])


def main() -> int:
    import os

    global ENV
    ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--main", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--skip-mechanisms", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {} if given.skip_mechanisms else dict(mechanisms(given.only))
    if given.train or given.main:
        found |= dict(trainings(given.main))
    if given.action == "record":
        torch.save(found, given.file)
        print(f"recorded {len(found)} entries, {sum(isinstance(x, str) for x in found.values())} of them refusals")
        return 0
    wanted = torch.load(given.file)
    wrong: list[str] = []
    exact = kernel = 0
    worst = 0.0
    for key, mine in found.items():
        theirs = wanted.get(key, "was not recorded")
        if isinstance(mine, str) or isinstance(theirs, str):
            if mine != theirs:
                shown = [x if isinstance(x, str) else "a result" for x in (theirs, mine)]
                wrong.append(f"{key}: {shown[0][-300:]} -> {shown[1][-300:]}")
            continue
        if key.startswith("train/"):
            theirs = {k.replace("theta", "threshold"): v for k, v in theirs.items()}
            mine = {k.replace("theta", "threshold"): v for k, v in mine.items()}
            differ = {k: (theirs.get(k), mine.get(k)) for k in theirs | mine if theirs.get(k) != mine.get(k)}
            if differ:
                wrong.append(f"{key}: {differ}")
            exact += not differ
            continue
        theirs, mine = ({k.replace("theta", "threshold"): x for k, x in each.items()} for each in (theirs, mine))
        if theirs.keys() != mine.keys():
            wrong.append(f"{key}: {sorted(theirs.keys() ^ mine.keys())}")
            continue
        same = all(torch.equal(theirs[k].nan_to_num(7e7), x.nan_to_num(7e7)) for k, x in mine.items())
        exact += same
        if same:
            continue
        far = max(
            float((theirs[k].double() - x.double()).abs().max() / theirs[k].double().abs().max().clamp_min(1e-9))
            for k, x in mine.items()
        )
        if "/auto/" in key and far < (1e-2 if "bfloat16" in key else 1e-5):
            kernel += 1
            worst = max(worst, far)
        else:
            which = [k for k, x in mine.items() if not torch.equal(theirs[k].nan_to_num(7e7), x.nan_to_num(7e7))]
            wrong.append(f"{key}: {which} differ by {far:.2g}")
    missing = (
        []
        if given.skip_mechanisms or given.only
        else [k for k in wanted if k not in found and not k.startswith("train/")]
    )
    wrong += [f"{key}: missing now" for key in missing]
    print("\n".join(wrong[:60]))
    print(f"{len(found)} compared: {exact} bit for bit, {kernel} kernels within {worst:.1g}, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
