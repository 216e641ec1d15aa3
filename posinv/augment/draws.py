"""Random draws that are a function of an utterance and a seed alone.

Not of the batch that an utterance is in, nor of what was drawn before: a run that was killed and
resumed, or that is split over processes, draws what an unbroken one does.
"""

import random
from hashlib import blake2b

import numpy as np


def generator(*keys: object) -> np.random.Generator:
    """Return a random generator that is a function of the keys (ids, a seed) alone."""
    digest = blake2b("\0".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def random_state(key: str, purpose: str) -> random.Random:
    """Return the random state of one utterance for one purpose, under torch's current seed.

    ESPnet seeds every epoch anew, so epochs draw differently.
    """
    import torch  # here: data preparation draws, too, and needs no torch

    return random.Random(f"{torch.initial_seed()}/{purpose}/{key}")
