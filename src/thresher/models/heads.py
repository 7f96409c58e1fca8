"""Reorder the head of a trained classifier to the classes of the data, by name; new classes get new rows."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

UNNAMED = re.compile(r"label_(\d+)")  # as transformers names unnamed classes
SHOWN = 10  # classes in a message
LOG = logging.getLogger(__name__)


def match_rows(known: Mapping[int, str], wanted: Sequence[str]) -> list[int | None] | None:
    """Match each wanted class to a row of a head; None where no row matches.

    Names match exactly, or up to case, blanks, hyphens and underscores. A class `LABEL_2` has no name; it also matches
    the name 2 if every wanted class gets a row that way.

    Args:
        known: Names of the classes of the head.
        wanted: Names of the classes of the data.

    Returns:
        The row of each wanted class; None if no name matches.
    """
    rows = {i: {str(name)} for i, name in known.items()}
    numbers = {i: UNNAMED.fullmatch(str(name).lower()) for i, name in known.items()}
    numbered = {i: names | ({number[1]} if (number := numbers[i]) else set()) for i, names in rows.items()}
    found = _match_names(numbered, wanted)
    if None in found:
        found = _match_names(rows, wanted)
    return None if all(row is None for row in found) else found


def _match_names(rows: Mapping[int, set[str]], wanted: Sequence[str]) -> list[int | None]:
    found: list[int | None] = []
    for name in wanted:
        same = [i for i, names in rows.items() if name in names]
        alike = [i for i, names in rows.items() if _simplify(name) in set(map(_simplify, names))]
        twins = [other for other in wanted if _simplify(other) == _simplify(name)]
        choice = same or (alike if len(twins) == 1 else [])
        found.append(choice[0] if len(choice) == 1 else None)
    return found


def _simplify(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def load_classifier(
    load: Callable[..., tuple[Any, Mapping[str, Any]]],
    build: Callable[[Any], Any],
    config: Any,
    num_classes: int,
    names: Sequence[str] | None,
) -> Any:
    """Load a classifier, give it the classes of the data as logits, and log the changes of its head.

    Args:
        load: Loads the model of a config; also returns which weights are missing or have another shape.
        build: Builds the model of a config with random weights.
        config: Config of the model, with its own classes.
        num_classes: Number of logits.
        names: Names of the classes of the data, in the order of the logits; None if they have none.

    Raises:
        ValueError: Weights outside the head have another shape, or the head is not linear.
    """
    known, own = dict(config.id2label), config.num_labels
    rows = match_rows(known, names) if names is not None else None
    order = ", ".join(f"{i} = {known[i]}" for i in sorted(known)[:SHOWN])
    renewed = f"the model tells {own} classes apart ({order}), the data {num_classes}; none matches, so its head is new"
    if rows is None and names is not None and not all(UNNAMED.fullmatch(str(name).lower()) for name in known.values()):
        model, _ = load(config)
        LOG.warning(renewed)
        _rearrange(model, build, [None] * num_classes)
        return model
    if rows is None:
        config.num_labels = num_classes
        model, info = load(config, ignore_mismatched_sizes=True)
        _check_shapes(info["mismatched_keys"], own, num_classes)
        if info["mismatched_keys"]:
            LOG.warning(renewed)
        elif names is not None and not _head_is_new(info["missing_keys"], config, build):
            taken = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:SHOWN]))
            LOG.warning(
                f"the model's classes have no names ({order}): its logits are taken in the data's order, {taken}"
            )
        return model
    assert names is not None
    model, info = load(config)
    if _head_is_new(info["missing_keys"], config, build):
        rows = [None] * num_classes
    elif rows != list(range(own)):
        pairs = list(zip(names, rows, strict=True))[:SHOWN]
        matches = ", ".join(f"{name} is " + ("new" if row is None else f"its {known[row]}") for name, row in pairs)
        LOG.info(f"the model's classes are matched to the data's by name: {matches}")
    if rows != list(range(own)):
        _rearrange(model, build, rows)
    return model


def _check_shapes(mismatched: Sequence[tuple[str, Any, Any]], own: int, wanted: int) -> None:
    other = [name for name, found, built in sorted(mismatched) if (found[0], built[0]) != (own, wanted)]
    if other:
        raise ValueError(
            f"weights of the model have another shape than model.config asks for: {', '.join(other[:5])}; leave out "
            "the entries that change them"
        )


def _find_head(config: Any, build: Callable[[Any], Any]) -> list[str]:
    """Find the names of the parameters whose first dimension is the number of classes."""
    own = config.num_labels
    shapes = []
    for count in (own, own + 1):
        config.num_labels = count
        with torch.device("meta"):
            shapes.append({name: p.shape for name, p in build(config).named_parameters()})
    config.num_labels = own
    one, more = shapes
    return [name for name, shape in one.items() if (shape[0], more[name][0]) == (own, own + 1)]


def _head_is_new(missing: Any, config: Any, build: Callable[[Any], Any]) -> bool:
    return bool(set(missing) & set(_find_head(config, build)))


def _rearrange(model: Any, build: Callable[[Any], Any], rows: Sequence[int | None]) -> None:
    """Rearrange the rows of a head; None gives a new row."""
    heads = {name.rpartition(".")[0] for name in _find_head(model.config, build)}
    for name in heads:
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise ValueError(f"the head {name} of the model is no linear layer, whose classes could be put in order")
        new = nn.Linear(old.in_features, len(rows), bias=old.bias is not None).to(old.weight)
        nn.init.normal_(new.weight, std=getattr(model.config, "initializer_range", 0.02))
        with torch.no_grad():
            for i, row in enumerate(rows):
                if row is not None:
                    new.weight[i] = old.weight[row]
            if new.bias is not None:
                nn.init.zeros_(new.bias)
                for i, row in enumerate(rows):
                    if row is not None:
                        new.bias[i] = old.bias[row]
        model.set_submodule(name, new)
    model.config.num_labels = len(rows)
    for module in model.modules():
        if isinstance(getattr(module, "num_labels", None), int):
            module.num_labels = len(rows)
