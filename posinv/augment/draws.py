"""Random draws that depend on keys alone: an utterance id, what is drawn, a random seed.

They do not depend on the batch that an utterance is in, nor on earlier draws. So a run that was
killed and resumed, or that is split over processes, draws the same as an unbroken one.

Both functions make a generator from keys. Data preparation takes :func:`generator` and gives the
seed as a key. Training takes :func:`random_state`, whose seed is torch's.
"""

import random
from hashlib import blake2b

import numpy as np


def generator(*keys: object) -> np.random.Generator:
    """Return numpy's generator for some keys (utterance ids, a purpose, a random seed)."""
    digest = blake2b("\0".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def random_state(utterance_id: str, purpose: str) -> random.Random:
    """Return Python's generator for one utterance, one purpose and torch's current random seed.

    ESPnet seeds torch at every epoch, so epochs draw differently.
    """
    import torch  # here, as data preparation needs no torch

    return random.Random(f"{torch.initial_seed()}/{purpose}/{utterance_id}")
