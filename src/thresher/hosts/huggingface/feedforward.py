"""Host for the feed-forward layers of Hugging Face's transformers.

Its model folders repeat a few layers under their own names, so layers are recognised by the class name:
`BertIntermediate`, `RobertaIntermediate`, ...; `T5DenseActDense`, ...; `LlamaMLP`, `Qwen3MLP`, ... Each mount checks
what the class really computes.
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from thresher.hosts.core import Host
from thresher.hosts.feedforward import FeedForwardHost, MakeFeedForward, mount_feed_forward

# Names of the parts, by the end of the class name. BERT's outer projection is in another module, beside the residual
# and the norm, so there hidden units that are not kept are returned as zeros.
LAYERS: Mapping[str, Mapping[str, Any]] = {
    "Intermediate": {"inner": ("dense",), "outer": None, "activation": "intermediate_act_fn"},
    "DenseActDense": {"inner": ("wi",), "outer": "wo", "activation": "act", "dropout": "dropout"},
    "DenseGatedActDense": {"inner": ("wi_0", "wi_1"), "outer": "wo", "activation": "act", "dropout": "dropout"},
    "MLP": {"inner": ("gate_proj", "up_proj"), "outer": "down_proj", "activation": "act_fn"},
}


def register_loaded() -> None:
    """Register the feed-forward classes of every imported model folder."""
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
        raise TypeError(f"{type(module).__name__} has no {', '.join(missing)}: this host does not support it")
    return FeedForwardHost(module, make, **parts)
