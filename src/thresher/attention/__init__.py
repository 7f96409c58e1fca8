"""Attention mechanisms, each in a file or folder; `contract.py` defines inputs and outputs, `mechanism.py` the base."""

from thresher.attention.contract import Attended, Call, Cost, KeyCodes, Pattern, ValueSource
from thresher.attention.mechanism import MakeMechanism, Mechanism
from thresher.attention.prepared import Prepared
from thresher.attention.registry import available, find, hyperparameters, name_of

__all__ = [
    "Attended",
    "Call",
    "Cost",
    "KeyCodes",
    "MakeMechanism",
    "Mechanism",
    "Pattern",
    "Prepared",
    "ValueSource",
    "available",
    "find",
    "hyperparameters",
    "name_of",
]
