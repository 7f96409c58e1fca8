"""Host for the feed-forward layers of Hugging Face's transformers.

Its model folders repeat a handful of layers under names of their own, so layers are known by how their class is
called: `BertIntermediate`, `RobertaIntermediate`, ...; `T5DenseActDense`, ...; `LlamaMLP`, `Qwen3MLP`, ... What a class
of such a name really computes is checked when it is mounted.
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from thresher.hosts.core import Host
from thresher.hosts.feedforward import FeedForwardHost, MakeFeedForward, mount_feed_forward

# By the end of the class name: what its parts are called. BERT's outer projection stands in another module, beside
# the residual and the norm, so there the hidden units that are not kept are handed on as zeros.
LAYERS: Mapping[str, Mapping[str, Any]] = {
    "Intermediate": {"inner": ("dense",), "outer": None, "activation": "intermediate_act_fn"},
    "DenseActDense": {"inner": ("wi",), "outer": "wo", "activation": "act", "dropout": "dropout"},
    "DenseGatedActDense": {"inner": ("wi_0", "wi_1"), "outer": "wo", "activation": "act", "dropout": "dropout"},
    "MLP": {"inner": ("gate_proj", "up_proj"), "outer": "down_proj", "activation": "act_fn"},
}


def register_loaded() -> None:
    """Register the feed-forward classes of every model folder that has been imported."""
    for name, folder in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for cls in vars(folder).values():
                if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name:
                    for ending, parts in LAYERS.items():
                        if cls.__name__.endswith(ending):
                            mount_feed_forward.register(cls, partial(_mount, parts))


def _mount(parts: Mapping[str, Any], module: nn.Module, make: MakeFeedForward) -> Host:
    missing = [name for name in (*parts["inner"], parts["activation"]) if not hasattr(module, name)]
    if missing:
        raise TypeError(f"{type(module).__name__} has no {', '.join(missing)}: not a layer that this host knows")
    return FeedForwardHost(module, make, **parts)
