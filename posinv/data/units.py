"""K-means units of MFCCs, the targets of masked prediction."""

from collections.abc import Iterable
from pathlib import Path

import librosa
import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin

from posinv.data.audio import SAMPLING_RATE
from posinv.data.files import atomic_file
from posinv.errors import InputError

WINDOW = 400  # samples: HuBERT's receptive field, 25 ms
HOP = 320  # samples: HuBERT's frames, 20 ms


def mfcc_features(wave: np.ndarray) -> np.ndarray:
    """Return 13 MFCCs with deltas and delta-deltas, aligned with the frames of an SSL model.

    Frame ``i`` is computed from samples ``320 i`` to ``320 i + 400``, what HuBERT's frame ``i``
    sees. Deltas are regressions over 5 windows 10 ms apart. Liftering as in Kaldi's MFCCs. The
    utterance's mean is subtracted, unlike HuBERT's: its units tell less of the speaker then.

    Args:
        wave: ``(T,)`` float32 at 16 kHz, T >= 400.

    Returns:
        ``(F, 39)`` float32, F the frames HuBERT has for T samples.
    """
    mfcc = librosa.feature.mfcc(
        y=librosa.effects.preemphasis(wave),
        sr=SAMPLING_RATE,
        n_mfcc=13,
        lifter=22,
        n_mels=23,
        fmin=20,
        n_fft=WINDOW,
        hop_length=HOP // 2,
        center=False,
    )
    deltas = [librosa.feature.delta(mfcc, width=5, order=n, mode="nearest") for n in (1, 2)]
    features = np.concatenate([mfcc, *deltas])[:, ::2].T
    return features - features.mean(0)


def learn_units(features: Iterable[np.ndarray], num_units: int, seed: int) -> np.ndarray:
    """Cluster frames by mini-batch k-means.

    Args:
        features: Utterances' features, each ``(F, D)``.
        num_units: The number of clusters, K.
        seed: Of the initialisation and the mini-batches.

    Returns:
        The centres, ``(K, D)`` float32.

    Raises:
        InputError: There are fewer frames than units.
    """
    frames = np.concatenate(list(features))
    if len(frames) < num_units:
        raise InputError(
            f"num_units {num_units}: more than the {len(frames)} frames to learn them from; "
            "take fewer units or more audio"
        )
    kmeans = MiniBatchKMeans(
        num_units,
        random_state=seed,
        n_init=5,
        batch_size=10000,
        max_no_improvement=20,
        reassignment_ratio=0.0,  # as in HuBERT's script
    )
    return kmeans.fit(frames).cluster_centers_.astype(np.float32)


def assign_units(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return each frame's nearest centre: ``(F, D)`` and ``(K, D)`` give ``(F,)`` int."""
    return pairwise_distances_argmin(features, centres)


def save_units_model(path: Path, centres: np.ndarray) -> None:
    """Write the centres as ``.npz``, atomically."""
    with atomic_file(path) as temporary:
        np.savez(temporary, centres=centres)


def load_units_model(path: Path) -> np.ndarray:
    """Read the centres that :func:`save_units_model` wrote.

    Raises:
        InputError: There is no such file, or it is another kind of file.
    """
    try:
        with np.load(path) as content:
            return content["centres"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such k-means file; learn one without --kmeans") from error
    # numpy raises many kinds for what is no .npz; without allow_pickle it runs no code of a file
    except Exception as error:
        raise InputError(f"{path}: not a k-means file of pretrain_units ({error})") from error
