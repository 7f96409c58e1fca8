"""Seed all random generators by a text, so that a step depends on nothing that ran before it."""

import hashlib
import random

import numpy as np
import torch


def seed_generators(key: str) -> None:
    """Seed the generators of torch, numpy and Python by the hash of a text."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
