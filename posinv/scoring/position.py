"""How much an SSL model's features depend on where in an utterance a frame is.

arXiv 2601.21084 says that a mean squared error (MSE) on SSL features can be lowered by position
instead of content. Here is how much position there is to win by. :func:`measure_position` measures
one model:

- the *shift*: how far the features of the same speech move when silence is put before it, as a
  share of the mean squared distance of two frames of an utterance. That is the part of what an
  MSE sees. Silence behind the speech moves no frame; what it changes comes from the context and
  from normalisation over time, and would be there without any position;
- a *linear probe* of the frame's index, fitted on some utterances and tested on others. Content
  alone predicts the index, too (there is silence at the edges, and pitch falls). So the probe is
  also used on the shifted speech: a probe that reads position *follows* the shift by the whole of
  it, one that reads content doesn't move;
- the *similarity* of frames of different utterances that have the same index, and of others.

:func:`enhanced_distances` measures how near enhanced speech is to the clean speech as it is, and to
clean speech that is shifted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.losses.functional import ssl_mse
from posinv.ssl.upstream import SSLUpstream

Read = Callable[[str], np.ndarray]
RIDGE = 1e-3  # of the features' mean variance


@dataclass(frozen=True)
class IndexProbe:
    """A linear probe of the frame's index on held-out utterances.

    Attributes:
        r2: its coefficient of determination; below 0, it is worse than the mean index.
        r2_shifted: the same on shifted speech, for the index that the frames have there.
        follows: by how much its prediction moves when the speech is shifted, over the shift.
    """

    r2: float
    r2_shifted: float
    follows: float


@dataclass(frozen=True)
class LayerPosition:
    """What :func:`measure_position` finds in one hidden state.

    Attributes:
        layer: its index.
        front: the shift by silence in front, a share of squared distances, by seconds.
        behind: what silence behind changes, likewise.
        start: the probe of the index from the start, and silence in front.
        end: the probe of the index from the end, and silence behind.
        same_index: mean cosine similarity, the mean frame subtracted, of frames of different
            utterances at the same index from the start.
        other_index: the same of frames at different indices.
    """

    layer: int
    front: dict[str, float]
    behind: dict[str, float]
    start: IndexProbe
    end: IndexProbe
    same_index: float
    other_index: float


def whole_hops(seconds: float, hop: int) -> int:
    """Return a silence's length in frames.

    Raises:
        InputError: no whole number of frames, or none.
    """
    hops, rest = divmod(round(seconds * SAMPLING_RATE), hop)
    if rest or hops < 1:
        raise InputError(
            f"silence of {seconds:g} s: must be whole frames of {hop / SAMPLING_RATE:g} s, so that "
            "the frames of the shifted speech are those of the speech"
        )
    return hops


@torch.inference_mode()
def measure_position(
    upstream: SSLUpstream, clean: Mapping[str, str], read: Read, silences: Sequence[float]
) -> list[LayerPosition]:
    """Measure how much position each hidden state of an SSL model holds.

    Args:
        upstream: the SSL model.
        clean: entry of ``wav.scp`` of each utterance. The probes are fitted on every other one;
            all figures are about the rest.
        read: returns the waveform that an entry names, float (T,) at 16 kHz.
        silences: seconds of silence, whole frames. The probes take the last one.

    Returns:
        One for each hidden state, 0 to L.

    Raises:
        InputError: less than four utterances, one of a single frame, or a silence that isn't
            whole frames.
    """
    if len(clean) < 4:
        raise InputError(f"{len(clean)} utterances: the probe needs at least 4: give more speech")
    hops = {f"{seconds:g}": whole_hops(seconds, upstream.hop) for seconds in silences}
    utterances = list(clean)
    fitted, held_out = utterances[::2], utterances[1::2]

    def features(utt: str, wave: np.ndarray) -> np.ndarray:
        found = _features(upstream, wave)
        if found.shape[1] < 2:
            raise InputError(
                f"utterance {utt}: its {len(wave)} samples give a single frame, and the shift is "
                "measured against the distance of two: leave it out of the data"
            )
        return found

    moments = [_Moments(upstream.output_size) for _ in range(upstream.num_layers)]
    for utt in fitted:
        for moment, x in zip(moments, features(utt, read(clean[utt])), strict=True):
            moment.add(x, _indices(len(x)))
    layers = [_Layer(*moment.fit(), hops) for moment in moments]
    for utt in held_out:
        wave = read(clean[utt])
        plain = features(utt, wave)
        frames = plain.shape[1]
        shifted: dict[str, np.ndarray] = {}
        behind: dict[str, np.ndarray] = {}
        for name, count in hops.items():
            padding = count * upstream.hop
            ahead = _features(upstream, np.pad(wave, (padding, 0)))
            shifted[name] = ahead[:, count : count + frames]
            behind[name] = _features(upstream, np.pad(wave, (0, padding)))[:, :frames]
        for index, layer in enumerate(layers):
            layer.add(
                plain[index],
                {name: x[index] for name, x in shifted.items()},
                {name: x[index] for name, x in behind.items()},
            )
    return [layer.result(index) for index, layer in enumerate(layers)]


def _features(upstream: SSLUpstream, wave: np.ndarray) -> np.ndarray:
    """Return all hidden states (L + 1, F, D) of one utterance, in float64."""
    return _encode(upstream, wave)[:, 0].double().cpu().numpy()


def _encode(upstream: SSLUpstream, wave: np.ndarray, layer: int | None = None) -> torch.Tensor:
    """Return one utterance's hidden state (1, F, D), or all of them (L + 1, 1, F, D)."""
    device = next(upstream.parameters()).device
    return upstream(torch.from_numpy(wave)[None].to(device), [len(wave)], layer=layer)[0]


def _indices(frames: int) -> np.ndarray:
    """Return each frame's index from the start and from the end, (F, 2)."""
    index = np.arange(frames, dtype=float)
    return np.stack([index, index[::-1]], axis=1)


class _Moments:
    """First and second moments of features (F, D) and targets (F, 2), and the fit from them."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = np.zeros(width + 2)
        self.products = np.zeros((width + 2, width + 2))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        both = np.concatenate([x, y], axis=1)
        self.count += len(both)
        self.total += both.sum(0)
        self.products += both.T @ both

    def fit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit by ridge regression: the mean frame (D,), the weights (D, 2), the means (2,)."""
        mean = self.total / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        within = covariance[:-2, :-2]
        ridge = RIDGE * np.trace(within) / len(within) + np.finfo(float).tiny
        weights = np.linalg.solve(within + ridge * np.eye(len(within)), covariance[:-2, -2:])
        return mean[:-2], weights, mean[-2:]


class _Layer:
    """The measures of one hidden state, over utterances."""

    def __init__(
        self, mean: np.ndarray, weights: np.ndarray, offset: np.ndarray, hops: Mapping[str, int]
    ) -> None:
        self.mean, self.weights, self.offset = mean, weights, offset
        self.hops = list(hops.values())[-1]  # of the shift that the probes take
        self.moved = {(side, name): 0.0 for side in ("front", "behind") for name in hops}
        self.within = 0.0
        self.targets: list[np.ndarray] = []
        self.predictions: list[np.ndarray] = []
        self.shifted: list[np.ndarray] = []
        self.by_index = np.zeros((0, len(mean)))  # sum of the frames at an index
        self.counts = np.zeros(0)
        self.own = 0.0  # products of the frames of an utterance with one another

    def add(
        self, x: np.ndarray, front: Mapping[str, np.ndarray], behind: Mapping[str, np.ndarray]
    ) -> None:
        """Add an utterance's features (F, D): alone, and with each silence."""
        n = len(x)
        self.within += 2 * x.var(axis=0, ddof=1).sum()
        for side, signals in (("front", front), ("behind", behind)):
            for name, moved in signals.items():
                self.moved[side, name] += np.square(moved - x).sum() / n
        self.targets.append(_indices(n))
        self.predictions.append(self._predict(x))
        starts, ends = list(front.values())[-1], list(behind.values())[-1]
        self.shifted.append(
            np.stack([self._predict(starts)[:, 0], self._predict(ends)[:, 1]], axis=1)
        )
        unit = x - self.mean
        unit /= np.linalg.norm(unit, axis=1, keepdims=True) + np.finfo(float).tiny
        if n > len(self.counts):
            more = n - len(self.counts)
            self.counts = np.concatenate([self.counts, np.zeros(more)])
            self.by_index = np.concatenate([self.by_index, np.zeros((more, x.shape[1]))])
        self.by_index[:n] += unit
        self.counts[:n] += 1
        self.own += np.square(unit.sum(0)).sum()

    def _predict(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) @ self.weights + self.offset

    def result(self, index: int) -> LayerPosition:
        shares = {key: value / self.within for key, value in self.moved.items()}
        targets, predictions, shifted = map(
            np.concatenate, (self.targets, self.predictions, self.shifted)
        )

        def probe(side: int) -> IndexProbe:
            target, prediction, moved = (z[:, side] for z in (targets, predictions, shifted))
            return IndexProbe(
                _r2(target, prediction),
                _r2(target + self.hops, moved),
                float((moved - prediction).mean() / self.hops),
            )

        # Sums over pairs of frames of different utterances, from squares of sums.
        same_pairs = (self.counts * (self.counts - 1)).sum()
        same = np.square(self.by_index).sum() - self.counts.sum()
        lengths = np.array([len(target) for target in self.targets])
        pairs = lengths.sum() ** 2 - np.square(lengths).sum()
        total = np.square(self.by_index.sum(0)).sum() - self.own
        return LayerPosition(
            index,
            {name: share for (side, name), share in shares.items() if side == "front"},
            {name: share for (side, name), share in shares.items() if side == "behind"},
            start=probe(0),
            end=probe(1),
            same_index=float(same / same_pairs),
            other_index=float((total - same) / (pairs - same_pairs)),
        )


def _r2(target: np.ndarray, prediction: np.ndarray) -> float:
    return float(1 - np.square(target - prediction).sum() / np.square(target - target.mean()).sum())


@torch.inference_mode()
def enhanced_distances(
    upstream: SSLUpstream,
    layer: int,
    clean: Mapping[str, str],
    systems: Mapping[str, Mapping[str, str]],
    read: Read,
    silences: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Measure the MSE of SSL features between each system's speech and the clean speech.

    It is :func:`~posinv.losses.functional.ssl_mse`, the mean over utterances.

    Args:
        upstream: the SSL model.
        layer: hidden state to compare, -1 for the last.
        clean: entry of ``wav.scp`` of each utterance's clean speech.
        systems: for each system, entries of its enhanced speech, at least those of ``clean``.
        read: returns the waveform that an entry names, float (T,) at 16 kHz.
        silences: seconds of silence that shift the clean speech, whole frames.

    Returns:
        For each system, the MSE to the clean speech (``"0"``), and to that with silence in front,
        by seconds.

    Raises:
        InputError: an utterance is missing, or isn't as long as its clean speech.
    """
    hops = {"0": 0, **{f"{s:g}": whole_hops(s, upstream.hop) for s in silences}}
    for system, entries in systems.items():
        if missing := sorted(clean.keys() - entries.keys()):
            raise InputError(
                f"{system}: no enhanced speech of utterance {missing[0]} ({len(missing)} missing): "
                "enhance all of the data, or choose data that has only those that are enhanced"
            )

    sums = {system: dict.fromkeys(hops, 0.0) for system in systems}
    for utt, entry in clean.items():
        wave = read(entry)
        references = {
            name: _encode(upstream, np.pad(wave, (count * upstream.hop, 0)), layer)[:, count:]
            for name, count in hops.items()
        }
        for system, entries in systems.items():
            enhanced = read(entries[utt])
            if len(enhanced) != len(wave):
                raise InputError(
                    f"{system}: utterance {utt} has {len(enhanced)} samples, its clean speech "
                    f"{len(wave)}: enhance this data"
                )
            x = _encode(upstream, enhanced, layer)
            for name, reference in references.items():
                sums[system][name] += ssl_mse(reference[:, : x.size(1)], x).item()
    return {
        system: {name: total / len(clean) for name, total in of.items()}
        for system, of in sums.items()
    }


def surviving_drop(
    distances: Mapping[str, Mapping[str, float]], baseline: str, systems: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    """Return the share of each system's drop in MSE that is left when the reference is shifted.

    Args:
        distances: what :func:`enhanced_distances` returns.
        baseline: the system from which the MSE drops.
        systems: the others.

    Returns:
        By system and seconds; None where the MSE of a system is no lower than the baseline's.
    """
    before = distances[baseline]
    found: dict[str, dict[str, float | None]] = {}
    for system in systems:
        after = distances[system]
        drop = before["0"] - after["0"]
        found[system] = {
            name: (before[name] - after[name]) / drop if drop > 0 else None
            for name in before
            if name != "0"
        }
    return found
