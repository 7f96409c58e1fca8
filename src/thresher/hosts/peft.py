"""Keep mechanisms trainable in models that PEFT adapts.

PEFT freezes every module that it is not asked to train, and trains a copy of each that it is.
"""

import sys
import warnings
from typing import Any

import torch
from torch import nn

from thresher.attention.mechanism import Metered

_HOW = "get_peft_model(model, LoraConfig(..., modules_to_save=['mechanism']))"


def find_running(mechanism: nn.Module) -> Any:
    """Find the mechanism that runs: PEFT wraps a mechanism that it trains, and keeps a copy for each adapter."""
    copies = None if isinstance(mechanism, Metered) else getattr(mechanism, "modules_to_save", None)
    if copies is None:
        return mechanism
    wrapper: Any = mechanism
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    return copies[active[0]] if active and active[0] in copies else wrapper.original_module


def warn_when_frozen(mechanism: Metered) -> None:
    """Make a mechanism warn when PEFT has frozen it."""
    if any(parameter.requires_grad for parameter in mechanism.parameters()):
        mechanism.register_forward_pre_hook(_warn_if_frozen)


def _warn_if_frozen(mechanism: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or "peft" not in sys.modules:
        return
    if mechanism.training and torch.is_grad_enabled() and not any(p.requires_grad for p in mechanism.parameters()):
        warnings.warn(
            f"the parameters of {type(mechanism).__name__} are frozen. PEFT trains and saves only the modules that "
            f"it is asked for: {_HOW}. To leave them untrained, pass trainable=False to sparsify()",
            stacklevel=2,
        )


def check_adapters(model: nn.Module, mechanism: Metered) -> None:
    """Refuse a mechanism whose state the existing adapters would not save.

    Raises:
        ValueError: The model has adapters of PEFT, and the mechanism has parameters or buffers.
    """
    if "peft" not in sys.modules or not mechanism.state_dict():
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the model has adapters of PEFT, whose files would not include the state of {type(mechanism).__name__}. "
            f"Call sparsify() first, then {_HOW}; or merge the adapters first, with merge_and_unload()"
        )
