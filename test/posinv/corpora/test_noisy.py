import csv
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from posinv.augment.draws import generator
from posinv.augment.noise import NOISES, excerpt, seamless
from posinv.corpora.noisy import MANIFEST_COLUMNS, SEEN, UNSEEN, Mixing, mix_noise, write_noise
from posinv.data.audio import read_audio, write_audio
from posinv.data.directory import DataDir, validate
from posinv.data.tables import read_table
from posinv.errors import InputError

RATE = 16000
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def clean(tmp_path) -> Path:
    """Three speakers of four utterances: tones at levels from quiet to nearly full scale."""
    folder = tmp_path / "clean set"
    (folder / "audio").mkdir(parents=True)
    wav = {}
    for speaker in "abc":
        for number in range(4):
            utt = f"{speaker}-{number}"
            rng = generator(utt)
            time = np.arange(rng.integers(8000, 12000)) / RATE
            tone = (0.02 + 0.3 * number) * np.sin(2 * np.pi * rng.uniform(100, 1000) * time)
            wav[utt] = str(folder / "audio" / f"{utt}.wav")
            write_audio(wav[utt], tone, RATE)
    text = dict.fromkeys(wav, "one")
    DataDir(wav, wav, text, dict.fromkeys(wav, "W AH N"), {utt: utt[0] for utt in wav}).write(
        folder
    )
    return folder


def manifest(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "manifest.tsv").open() as file:
        return {row["utt"]: row for row in csv.DictReader(file, delimiter="\t")}


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes().replace(bytes(directory), b"")
        for path in directory.rglob("*")
        if path.is_file()
    }


def band_levels(x: np.ndarray, edges: list[float]) -> np.ndarray:
    power = np.abs(np.fft.rfft(x)) ** 2
    f = np.fft.rfftfreq(len(x), 1 / RATE)
    bands = pairwise(edges)
    return np.array([10 * np.log10(power[(f >= a) & (f < b)].mean()) for a, b in bands])


@pytest.mark.parametrize(("name", "slope"), [("white", 0), ("pink", -3.01), ("brown", -6.02)])
def test_spectral_slopes(name, slope):
    x = NOISES[name](generator(name), 60 * RATE, RATE)
    octaves = band_levels(x, [62.5 * 2**k for k in range(8)])
    np.testing.assert_allclose(np.diff(octaves), slope, atol=0.25)


def test_hum_has_lines_at_mains_harmonics():
    x = NOISES["hum"](generator("hum"), 20 * RATE, RATE)
    power = np.abs(np.fft.rfft(x)) ** 2
    f = np.fft.rfftfreq(len(x), 1 / RATE)
    shares = []
    for mains in (50, 60):
        harmonic = np.round(f / mains)
        near = np.abs(f - harmonic * mains) <= 0.35 * harmonic
        shares.append(power[near & (harmonic >= 1) & (harmonic <= 6)].sum() / power.sum())
    assert max(shares) > 0.7 and min(shares) < 0.35


def test_modulated_noise_rises_and_falls_slowly():
    for seed in range(5):
        x = NOISES["modulated"](generator(seed), 20 * RATE, RATE)
        envelope = np.mean((x**2).reshape(-1, RATE // 100), axis=1)  # at 100 Hz
        spectrum = np.abs(np.fft.rfft(envelope - envelope.mean())) ** 2
        peak = np.fft.rfftfreq(len(envelope), 0.01)[spectrum.argmax()]
        assert 2 <= peak <= 8
        white = NOISES["white"](generator(seed), 20 * RATE, RATE)
        flat = np.mean((white**2).reshape(-1, RATE // 100), axis=1)
        assert envelope.std() / envelope.mean() > 3 * flat.std() / flat.mean()


def test_impulsive_noise_is_sparse():
    x = NOISES["impulsive"](generator("i"), 20 * RATE, RATE)
    assert np.mean(x**4) / np.mean(x**2) ** 2 > 15  # kurtosis; Gaussian noise has 3
    assert np.mean(np.abs(x) < 0.06) > 0.6


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("num_samples", [400, 401, 16000])
def test_every_noise_has_its_length_and_power(name, num_samples):
    x = NOISES[name](generator(name, num_samples), num_samples, RATE)
    assert x.shape == (num_samples,) and np.isfinite(x).all() and np.mean(x**2) > 0


def test_seen_and_unseen_noises_are_different_processes():
    assert not set(SEEN) & set(UNSEEN)
    edges = [50.0, 200, 800, 3200, 8000]
    shapes = {}
    for name in (set(SEEN) | set(UNSEEN)) - {"babble"}:
        x = NOISES[name](generator(name), 20 * RATE, RATE)
        x /= np.sqrt(np.mean(x**2))
        kurtosis = 10 * np.log10(np.mean(x**4))
        envelope = np.mean((x**2).reshape(-1, RATE // 50), axis=1)
        shapes[name] = np.append(band_levels(x, edges), [kurtosis, 20 * np.log10(envelope.std())])
    for a in set(SEEN) - {"babble"}:
        for b in UNSEEN:
            assert np.abs(shapes[a] - shapes[b]).max() > 5, (a, b)  # dB


def test_excerpt_of_a_long_signal_is_a_slice():
    x = np.arange(100.0)
    y, start = excerpt(x, 30, generator(1), 5)
    np.testing.assert_array_equal(y, x[start : start + 30])
    np.testing.assert_array_equal(excerpt(x, 100, generator(1), 5)[0], x)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_excerpt_of_a_short_signal_loops_without_a_jump(size):
    x = np.sin(np.linspace(0, 1, size)) + 2
    y, _ = excerpt(x, 3456, generator(2), 200)
    period = size - min(200, size // 4)
    assert y.shape == (3456,)
    np.testing.assert_array_equal(y[period:], y[:-period])
    assert size < 1000 or np.abs(np.diff(y)).max() < 0.03  # ends 0.84 apart


def test_seamless_keeps_power_and_all_but_the_fade():
    x = generator(3).standard_normal(5000)
    loop = seamless(x, 800)
    assert loop.shape == (4200,)
    np.testing.assert_array_equal(loop[800:], x[800:4200])
    powers = [
        np.mean(seamless(generator(k).standard_normal(2000), 400)[:400] ** 2) for k in range(200)
    ]
    assert np.mean(powers) == pytest.approx(1, abs=0.02)


def test_snr_is_what_was_asked_and_references_match(clean, tmp_path):
    mixing = Mixing((*SEEN, *UNSEEN), (-5, 0, 10), 3, "mix", babble=clean)
    assert mix_noise(clean, tmp_path / "mix", mixing, copies=3, nj=2) == 36
    assert validate(tmp_path / "mix", RATE) > 0
    data, rows = DataDir.read(tmp_path / "mix"), manifest(tmp_path / "mix")
    source = DataDir.read(clean)
    assert tuple(next(iter(rows.values()))) == MANIFEST_COLUMNS
    assert {row["noise"] for row in rows.values()} == {*SEEN, *UNSEEN}
    assert {row["snr_db"] for row in rows.values()} == {"-5", "0", "10"}
    scaled = 0
    for utt, row in rows.items():
        original = read_audio(source.wav[row["source_utt"]], RATE)
        noisy, ref = read_audio(data.wav[utt], RATE), read_audio(data.spk1[utt], RATE)
        gain = float(row["gain"])
        np.testing.assert_allclose(ref, gain * original, atol=0.51 / 32768 + 1e-6)
        noise = noisy.astype(float) - ref
        snr = 10 * np.log10(np.mean(ref.astype(float) ** 2) / np.mean(noise**2))
        assert snr == pytest.approx(float(row["snr_db"]), abs=0.01), row
        assert np.abs(noisy).max() <= 0.99 + 1 / 32768
        scaled += gain < 1
        assert (data.spk1[utt] == source.spk1[row["source_utt"]]) == (gain == 1)
        assert data.utt2spk[utt] == utt[0]
    assert 0 < scaled < len(rows)


def test_silence_and_speed(clean, tmp_path):
    mixing = Mixing(("white",), (10,), 0, "both", (0.2, 1.0), (0.85, 1.15))
    mix_noise(clean, tmp_path / "both", mixing)
    data, rows = DataDir.read(tmp_path / "both"), manifest(tmp_path / "both")
    source = DataDir.read(clean)
    assert {row["speed"] for row in rows.values()} == {"0.85", "1.15"}
    silences = [float(row["silence_s"]) for row in rows.values()]
    assert 0.2 <= min(silences) < 0.6 < max(silences) <= 1.0
    for utt, row in rows.items():
        original = read_audio(source.wav[row["source_utt"]], RATE)
        noisy, ref = read_audio(data.wav[utt], RATE), read_audio(data.spk1[utt], RATE)
        front = round(float(row["silence_s"]) * RATE)
        speed = float(row["speed"])
        assert not ref[:front].any() and np.std(noisy[:front]) > 0
        assert len(ref) - front == pytest.approx(len(original) / speed, abs=1)
        expected = float(row["gain"]) * soxr.resample(original.astype(float), RATE * speed, RATE)
        np.testing.assert_allclose(ref[front:], expected, atol=1 / 32768)
        noise = (noisy.astype(float) - ref)[front:]
        snr = 10 * np.log10(np.mean(ref[front:].astype(float) ** 2) / np.mean(noise**2))
        assert snr == pytest.approx(10, abs=0.01)
        # A tone's pitch moves with its speed.
        tones = [np.abs(np.fft.rfft(x, 2**17)).argmax() for x in (original, ref[front:])]
        assert tones[1] / tones[0] == pytest.approx(speed, rel=0.01)


def test_two_runs_give_identical_bytes_and_the_seed_changes_them(clean, tmp_path):
    def run(name, seed, nj):
        mixing = Mixing((*SEEN, *UNSEEN), (5, 10), seed, "x", babble=clean)
        mix_noise(clean, tmp_path / name, mixing, nj=nj)
        return snapshot(tmp_path / name)

    first = run("first", 0, 1)
    assert len(first) >= 18
    assert run("second", 0, 2) == first
    assert run("third", 1, 1)["manifest.tsv"] != first["manifest.tsv"]


def test_draws_depend_on_id_and_seed_alone(clean, tmp_path):
    mixing = Mixing((*SEEN, *UNSEEN), (5, 10), 0, "x", (0, 1), (0.9, 1.1), babble=clean)
    mix_noise(clean, tmp_path / "all", mixing)
    data = DataDir.read(clean)
    kept = ("b-1", "c-2")
    tables = (data.wav, data.spk1, data.text, data.phn, data.utt2spk)
    DataDir(*({utt: table[utt] for utt in kept} for table in tables)).write(tmp_path / "part")
    mix_noise(tmp_path / "part", tmp_path / "few", mixing)
    rows, few = manifest(tmp_path / "all"), manifest(tmp_path / "few")
    assert few == {utt: rows[utt] for utt in ("b-1-x", "c-2-x")}
    for utt in few:
        a, b = (tmp_path / name / "audio" / f"{utt}.flac" for name in ("all", "few"))
        assert a.read_bytes() == b.read_bytes()


def test_babble_is_of_other_speakers(clean, tmp_path):
    mix_noise(clean, tmp_path / "x", Mixing(("babble",), (5,), 0, "x", babble=clean))
    for utt, row in manifest(tmp_path / "x").items():
        talkers = row["noise_source"].split(",")
        assert 4 <= len(talkers) <= 6 and len(set(talkers)) == len(talkers)
        assert all(talker[0] != utt[0] for talker in talkers)


def test_recorded_noise(clean, tmp_path):
    folder = tmp_path / "noise files"
    folder.mkdir()
    write_audio(folder / "short.wav", 0.5 * np.sin(np.arange(3000)), RATE)
    write_audio(folder / "long.flac", 0.1 * generator(0).standard_normal(50000), RATE)
    mixing = Mixing(("recorded",), (0,), 0, "r", recorded=(folder,))
    mix_noise(clean, tmp_path / "x", mixing)
    rows, data = manifest(tmp_path / "x"), DataDir.read(tmp_path / "x")
    names = {row["noise_source"].partition("@")[0] for row in rows.values()}
    assert names == {str(folder / "short.wav"), str(folder / "long.flac")}
    recording = read_audio(str(folder / "long.flac"), RATE)
    for utt, row in rows.items():
        path, _, start = row["noise_source"].partition("@")
        if path.endswith("long.flac"):
            noise = read_audio(data.wav[utt], RATE) - read_audio(data.spk1[utt], RATE)
            piece = recording[int(start) : int(start) + len(noise)]
            assert np.corrcoef(noise, piece)[0, 1] > 0.999


def test_noise_recordings(clean, tmp_path):
    out, types = tmp_path / "noise set", ("white", "hum", "impulsive", "babble")
    assert write_noise(out, types, 2.5, 0, clean, nj=2) == 4
    table = read_table(out / "wav.scp")
    assert table == {name: str(out / f"{name}.flac") for name in types}
    assert {path.name for path in out.iterdir()} == {"wav.scp", *(f"{name}.flac" for name in types)}
    for name, path in table.items():
        x = read_audio(path, RATE)
        assert x.shape == (2.5 * RATE,)
        rms, peak = np.sqrt(np.mean(x.astype(float) ** 2)), np.abs(x).max()
        assert peak <= 0.99 + 1 / 32768
        if peak < 0.98:
            assert rms == pytest.approx(0.1, rel=1e-3)
        else:
            assert name == "impulsive" and rms < 0.1
    flat = band_levels(read_audio(table["white"], RATE), [100.0, 1000, 4000, 8000])
    assert np.ptp(flat) < 1
    lines = read_audio(table["hum"], RATE)
    assert np.ptp(band_levels(lines, [40.0, 1300, 8000])) > 20
    voices = np.abs(np.fft.rfft(read_audio(table["babble"], RATE)))  # the speakers' tones
    assert np.sort(voices)[: len(voices) // 2].max() < 0.01 * voices.max()


def test_noise_recordings_depend_on_type_and_seed_alone(clean, tmp_path):
    def write(name, types, seed, nj):
        write_noise(tmp_path / name, types, 0.5, seed, clean, nj, 8000 if name == "low" else RATE)
        return snapshot(tmp_path / name)

    first = write("x", ("white", "babble"), 0, 1)
    assert (
        write("y", ("babble", "pink", "white", "white"), 0, 2).items()
        >= {name: audio for name, audio in first.items() if name != "wav.scp"}.items()
    )
    assert write("x", ("white", "babble"), 0, 2) == first  # replaces the earlier folder
    other = write("x", ("white", "babble"), 1, 1)
    assert other["white.flac"] != first["white.flac"]
    assert other["babble.flac"] != first["babble.flac"]


def test_bad_noise_recordings(clean, tmp_path):
    out = tmp_path / "noise"
    for options, message in {
        (("grey",), 1, 0): "unknown type 'grey': choose from white pink .* babble$",
        (("recorded",), 1, 0): "unknown type 'recorded'",
        ((), 1, 0): "--noise_types: name at least one",
        (("babble",), 1, 0): "--babble_src: the noise type 'babble' needs a data directory",
        (("white",), 0, 0): "--seconds 0",
        (("white",), np.nan, 0): "--seconds nan",
        (("white",), np.inf, 0): "--seconds inf",
        (("pink",), 1 / RATE, 0): r"pink \(-\): silent",
    }.items():
        with pytest.raises(InputError, match=message):
            write_noise(out, *options)
    with pytest.raises(InputError, match="would overwrite the source"):
        write_noise(clean, ("babble",), 1, 0, clean)
    for path in (clean / "audio").iterdir():
        write_audio(path, np.zeros(8000), RATE)
    with pytest.raises(InputError, match=r"babble \([abc]-\d,.*\): silent"):
        write_noise(out, ("babble",), 1, 0, clean)
    assert [path.name for path in tmp_path.iterdir()] == [clean.name]


def test_noise_recordings_command(clean, tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "posinv.bin.make_noise", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    out = tmp_path / "a noise set"
    done = run("--out", out, "--seconds", "0.5", "--babble_src", clean)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 4 noise recordings\n"
    assert read_table(out / "wav.scp").keys() == set(SEEN)
    done = run("--out", tmp_path / "y")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("make_noise: error: --babble_src: the noise type 'babble'")
    assert not (tmp_path / "y").exists()


def test_bad_options():
    for options, message in {
        (("grey",), (5,), 0, "x"): "unknown type 'grey': choose from white pink hum",
        ((), (5,), 0, "x"): "each need at least one value",
        (("white",), (), 0, "x"): "each need at least one value",
        (("white",), (np.inf,), 0, "x"): "--snrs: inf",
        (("white",), (5,), 0, "a b"): "--tag: 'a b'",
        (("white",), (5,), 0, "x", (1, 0.5)): "--silence: 1 0.5",
        (("white",), (5,), 0, "x", None, (0.0,)): "--speeds: 0.0",
        (("babble",), (5,), 0, "x"): "--babble_src",
        (("recorded",), (5,), 0, "x"): "--recorded",
    }.items():
        with pytest.raises(InputError, match=message):
            Mixing(*options)


def test_bad_sources(clean, tmp_path):
    mixing = Mixing(("white",), (5,), 0, "x")
    with pytest.raises(InputError, match="would overwrite the source"):
        mix_noise(clean, clean, mixing)
    with pytest.raises(InputError, match="--copies 0"):
        mix_noise(clean, tmp_path / "x", mixing, copies=0)
    with pytest.raises(InputError, match="no audio files there"):
        mix_noise(
            clean, tmp_path / "x", Mixing(("recorded",), (5,), 0, "x", recorded=(tmp_path / "no",))
        )
    write_audio(clean / "audio" / "b-1.wav", np.zeros(8000), RATE)
    with pytest.raises(InputError, match=r"utterance b-1: .*b-1.wav: silent"):
        mix_noise(clean, tmp_path / "x", mixing, nj=2)
    (clean / "audio" / "b-1.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"utterance b-1: .*empty audio file"):
        mix_noise(clean, tmp_path / "x", mixing)
    assert [path.name for path in tmp_path.iterdir()] == [clean.name]


def test_stereo_and_mp3_noises_and_one_that_cannot_be_read(clean, tmp_path):
    folder = tmp_path / "noises"
    folder.mkdir()
    x = 0.1 * generator("noise").standard_normal((3 * RATE, 2))
    soundfile.write(folder / "stereo.wav", x, RATE)
    soundfile.write(folder / "a.mp3", x[:, 0], RATE, format="MP3")
    mixing = Mixing(("recorded",), (5,), 0, "x", recorded=(folder,))
    mix_noise(clean, tmp_path / "noisy", mixing)
    rows = manifest(tmp_path / "noisy")
    names = {Path(row["noise_source"].rpartition("@")[0]).name for row in rows.values()}
    assert names == {"stereo.wav", "a.mp3"}
    (folder / "b.m4a").write_text("x")
    with pytest.raises(InputError, match=r"b.m4a \(1 such\): a format that soundfile can't read"):
        mix_noise(clean, tmp_path / "again", mixing)


def test_silent_stretches_of_a_recording_are_not_drawn(clean, tmp_path):
    recording = tmp_path / "recording.wav"
    x = np.zeros(40 * RATE)
    x[15 * RATE : 30 * RATE] = 0.1 * generator("noise").standard_normal(15 * RATE)
    write_audio(recording, x, RATE)
    mixing = Mixing(("recorded",), (5,), 0, "x", recorded=(recording,))
    assert mix_noise(clean, tmp_path / "noisy", mixing) == 12
    silence = tmp_path / "silence.wav"
    write_audio(silence, 0 * x, RATE)
    with pytest.raises(InputError, match=r"silence.wav@\d+: silent, as 19 other draws"):
        mix_noise(clean, tmp_path / "x", Mixing(("recorded",), (5,), 0, "x", recorded=(silence,)))


def test_noise_is_not_mixed_into_noisy_audio(clean, tmp_path):
    mixing = Mixing(("white",), (5,), 0, "x")
    mix_noise(clean, tmp_path / "noisy", mixing)
    with pytest.raises(InputError, match=r"spk1.scp: utterance a-0-x \(12 such\) has a clean"):
        mix_noise(tmp_path / "noisy", tmp_path / "twice", mixing)


def test_command(clean, tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "posinv.bin.mix_noise", "--src", clean, *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    done = run(
        *("--out", tmp_path / "x", "--noise_types", "white pink", "--snrs", "-5 5"),
        *("--silence", "0.2", "1.0", "--tag", "shift"),
    )
    assert done.returncode == 0, done.stderr
    assert validate(tmp_path / "x", RATE) > 0
    done = run("--out", tmp_path / "y", "--noise_types", "white grey")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("mix_noise: error: --noise_types: unknown type 'grey'")
    done = run("--out", tmp_path / "y", "--noise_types", "white", "--snrs", "loud")
    assert done.returncode == 1 and "--snrs 'loud': numbers" in done.stderr
    assert not (tmp_path / "y").exists()
