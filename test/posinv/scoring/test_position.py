"""The position that features hold, against brute force and on models that hold all or none."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity
from tiny_ssl import TINY_SSL
from transformers import Wav2Vec2FeatureExtractor

from posinv.bin.position_probe import main
from posinv.data.audio import write_audio
from posinv.data.tables import write_table
from posinv.errors import InputError
from posinv.scoring.position import (
    RIDGE,
    enhanced_distances,
    measure_position,
    surviving_drop,
)
from posinv.ssl.sinusoidal_hubert import SinusoidalHubertConfig, SinusoidalHubertModel
from posinv.ssl.upstream import SSLUpstream

HOP = 320
SILENCES = [0.04, 0.2]  # 2 and 10 frames


def clean(utterances):
    return {f"u{utt}": utt for utt in range(utterances)}


def speech(utt, seconds=0.6):
    rng = np.random.default_rng(utt)
    return rng.uniform(-0.3, 0.3, round(16000 * seconds) + 331 * utt).astype(np.float32)


def ssl_model(folder, **options):
    torch.manual_seed(2)
    # Layer norm: the convolutions hear nothing of the silence.
    options = {"feat_extract_norm": "layer", "positional_convolution": False, **options}
    SinusoidalHubertModel(SinusoidalHubertConfig(**TINY_SSL, **options)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def some_position(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssl")
    return ssl_model(folder, positional_convolution=True, sinusoid_scale=0.3)


@torch.inference_mode()
def features(upstream, wave):
    return upstream(torch.from_numpy(wave)[None], [len(wave)])[0][:, 0].double().numpy()


def test_as_brute_force(some_position):
    upstream = SSLUpstream(some_position)
    found = measure_position(upstream, clean(7), speech, SILENCES)
    assert [one.layer for one in found] == [0, 1, 2]
    silence = np.zeros(10 * HOP, np.float32)
    plain = [features(upstream, speech(utt)) for utt in range(7)]
    ahead = [features(upstream, np.concatenate([silence, speech(utt)])) for utt in range(7)]
    after = [features(upstream, np.concatenate([speech(utt), silence])) for utt in range(7)]
    for layer, one in enumerate(found):
        fit = np.concatenate([x[layer] for x in plain[::2]])
        probe = Ridge(alpha=RIDGE * len(fit) * fit.var(axis=0).mean())
        for side, moved in (("start", ahead), ("end", after)):

            def index(x, side=side):
                return np.arange(len(x)) if side == "start" else np.arange(len(x))[::-1]

            probe.fit(fit, np.concatenate([index(x[layer]) for x in plain[::2]]))
            target = np.concatenate([index(x[layer]) for x in plain[1::2]])
            guess = np.concatenate([probe.predict(x[layer]) for x in plain[1::2]])
            on_moved = np.concatenate(
                [
                    probe.predict(y[layer][10:] if side == "start" else y[layer][: len(x[layer])])
                    for x, y in zip(plain[1::2], moved[1::2], strict=True)
                ]
            )
            result = getattr(one, side)
            assert result.r2 == pytest.approx(r2_score(target, guess), abs=1e-6)
            assert result.r2_shifted == pytest.approx(r2_score(target + 10, on_moved), abs=1e-6)
            assert result.follows == pytest.approx((on_moved - guess).mean() / 10, abs=1e-6)
        within, front, behind, same, other = 0, 0, 0, [], []
        for x, y, z in zip(plain[1::2], ahead[1::2], after[1::2], strict=True):
            n = len(x[layer])
            pairs = ((x[layer][:, None] - x[layer][None]) ** 2).sum(2)
            within += pairs.sum() / (n * (n - 1))
            front += ((y[layer][10:] - x[layer]) ** 2).sum(1).mean()
            behind += ((z[layer][:n] - x[layer]) ** 2).sum(1).mean()
        assert one.front["0.2"] == pytest.approx(front / within)
        assert one.behind["0.2"] == pytest.approx(behind / within)
        centred = [x[layer] - fit.mean(axis=0) for x in plain[1::2]]
        for k, x in enumerate(centred):
            for y in centred[k + 1 :]:
                for row, similarities in enumerate(cosine_similarity(x, y)):
                    for column, value in enumerate(similarities):
                        (same if row == column else other).append(value)
        assert one.same_index == pytest.approx(np.mean(same))
        assert one.other_index == pytest.approx(np.mean(other))


def test_no_position_is_found_where_there_is_none(tmp_path):
    """Before the first layer, features are those of the convolutions, which see no position."""
    upstream = SSLUpstream(ssl_model(tmp_path))
    first, *_ = measure_position(upstream, clean(6), speech, SILENCES)
    for value in (*first.front.values(), *first.behind.values()):
        assert value < 1e-9
    assert abs(first.start.follows) < 1e-4
    assert abs(first.end.follows) < 1e-4


def test_all_is_position_where_the_sinusoids_drown_speech(tmp_path):
    upstream = SSLUpstream(ssl_model(tmp_path, sinusoid_scale=30.0))
    first, *_ = measure_position(upstream, clean(6), speech, SILENCES)
    assert first.start.r2 > 0.99
    assert first.start.follows > 0.5
    assert first.front["0.2"] > 0.5
    assert first.front["0.2"] > first.front["0.04"] > 0.1
    # They count from the start: silence behind changes nothing.
    assert first.behind["0.2"] < 1e-9
    assert abs(first.end.follows) < 1e-4
    assert first.same_index > 0.9 > first.other_index


def test_distances_to_clean_and_shifted_clean_speech(some_position):
    upstream = SSLUpstream(some_position)
    clean = {f"u{k}": str(k) for k in range(3)}
    systems = {"noisy": dict.fromkeys(clean, "noisy"), "clean": clean}
    rng = np.random.default_rng(3)
    noise = {len(speech(k)): rng.normal(0, 0.1, len(speech(k))) for k in range(3)}
    last = {}

    def read(entry):
        if entry == "noisy":  # of the clean speech that was read before
            wave = last["wave"]
            return (wave + noise[len(wave)]).astype(np.float32)
        last["wave"] = speech(int(entry))
        return last["wave"]

    found = enhanced_distances(upstream, 1, clean, systems, read, [0.2])
    expected = {"0": [], "0.2": []}
    silence = np.zeros(10 * HOP, np.float32)
    for k in range(3):
        wave = speech(k)
        noisy = features(upstream, (wave + noise[len(wave)]).astype(np.float32))[1]
        expected["0"].append(((noisy - features(upstream, wave)[1]) ** 2).sum(1).mean())
        shifted = features(upstream, np.concatenate([silence, wave]))[1][10:]
        expected["0.2"].append(((noisy - shifted) ** 2).sum(1).mean())
    assert found["noisy"] == pytest.approx({k: np.mean(v) for k, v in expected.items()}, rel=1e-4)
    assert found["clean"]["0"] == 0.0
    assert found["clean"]["0.2"] > 0
    drop = found["noisy"]["0"] - found["clean"]["0"]
    assert surviving_drop(found, "noisy", ["clean"]) == {
        "clean": {"0.2": (found["noisy"]["0.2"] - found["clean"]["0.2"]) / drop}
    }
    assert surviving_drop(found, "clean", ["noisy"]) == {"noisy": {"0.2": None}}


@pytest.mark.parametrize(
    ("utterances", "silences", "message"),
    [(3, [0.2], "at least 4"), (6, [0.03], "whole frames of 0.02 s"), (6, [0.0], "whole frames")],
)
def test_refused(some_position, utterances, silences, message):
    with pytest.raises(InputError, match=re.escape(message)):
        measure_position(SSLUpstream(some_position), clean(utterances), speech, silences)


@pytest.mark.parametrize("utt", [2, 3])
def test_an_utterance_of_one_frame_is_refused(some_position, utt):
    def read(entry):
        return speech(entry)[: 500 if entry == utt else None]

    with pytest.raises(InputError, match=f"utterance u{utt}: its 500 samples give a single frame"):
        measure_position(SSLUpstream(some_position), clean(6), read, SILENCES)


@pytest.fixture
def data(tmp_path):
    """A data directory of noisy speech, and enhanced speech that is nearer to the clean."""
    lists = {name: {} for name in ("data/wav.scp", "data/spk1.scp", "a/enhanced/spk1.scp")}
    for utt in range(6):
        wave = speech(utt)
        noise = np.random.default_rng(100 + utt).normal(0, 0.1, len(wave))
        for (name, table), part in zip(lists.items(), (1, 0, 0.3), strict=True):
            path = tmp_path / name.replace("/", "_") / f"{utt}.wav"
            path.parent.mkdir(exist_ok=True)
            write_audio(path, (wave + part * noise).clip(-1, 1), 16000)
            table[f"u{utt}"] = str(path)
    for name, table in lists.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_table(tmp_path / name, table)
    return tmp_path


def probe(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["position_probe", *map(str, args)])
    main()


def test_command(some_position, data, monkeypatch, capsys):
    out = data / "out"
    options = ("--ssl", some_position, "--data", data / "data", "--out", out)
    probe(monkeypatch, *options, "--enhanced", f"ssl_mse={data / 'a'}")
    result = json.loads((out / "position.json").read_text())
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2]
    assert result["distances"]["ssl_mse"]["0"] < result["distances"]["noisy input"]["0"]
    assert result["surviving"]["ssl_mse"].keys() == {"0.1", "0.5"}
    printed = capsys.readouterr().out
    assert printed == (out / "position.md").read_text()
    assert "| ssl_mse" in printed
    assert (out / "position.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(InputError, match="neither"):
        probe(monkeypatch, *options, "--enhanced", data / "none")
    with pytest.raises(InputError, match="--baseline enh: must be one of noisy input, ssl_mse"):
        probe(monkeypatch, *options, "--enhanced", f"ssl_mse={data / 'a'}", "--baseline", "enh")
    with pytest.raises(InputError, match="given twice"):
        probe(monkeypatch, *options, "--enhanced", f"x={data / 'a'}", f"x={data / 'a'}")
    table = (data / "a" / "enhanced" / "spk1.scp").read_text().splitlines(keepends=True)
    (data / "a" / "enhanced" / "spk1.scp").write_text("".join(table[1:]))
    with pytest.raises(InputError, match="ssl_mse: no enhanced speech of utterance u0"):
        probe(monkeypatch, *options, "--enhanced", f"ssl_mse={data / 'a'}")
