import gzip
import sys
from functools import partial

import kaldiio
import numpy as np
import pytest
import soundfile

from posinv.corpora import imported
from posinv.corpora.imported import import_cuts
from posinv.corpora.lexicon import Lexicon
from posinv.corpora.prepared import Contents, Prepared
from posinv.data.audio import read_audio
from posinv.data.directory import DataDir, validate
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError

LEXICON = Lexicon({"ONE": "W AH N", "TWO": "T UW"}, g2p=False)


# The fixtures' lists have a command; test/faults tests what becomes of commands otherwise.
import_kaldi = partial(imported.import_kaldi, allow_pipes=True)


def pcm(seed, samples, rate=16000):
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


@pytest.fixture
def kaldi(tmp_path):
    """A Kaldi directory of three recordings (a file, an archive, a command) of 2 s."""
    src = tmp_path / "a recipe" / "data" / "train"
    src.mkdir(parents=True)
    top = tmp_path / "a recipe"
    x = [pcm(i, 32000) for i in range(3)]
    soundfile.write(top / "rec0.flac", x[0], 16000)
    kaldiio.save_ark(str(top / "wav.ark"), {"rec1": (16000, x[1])}, scp=str(top / "ark.scp"))
    offset = (top / "ark.scp").read_text().rpartition(":")[2]
    soundfile.write(top / "rec2.wav", x[2], 16000)
    lists = {
        "wav.scp": f"rec0 rec0.flac\nrec1 wav.ark:{offset}rec2 cat rec2.wav |\n",
        "segments": "ann-a rec0 0.0 0.5\nann-b rec0 1.25 -1\nbob-a rec1 0.3 1.0\nbob-b rec2 0 2\n",
        "text": "ann-a one\nann-b two\nbob-a one two\nbob-b TWO\n",
        "utt2spk": "ann-a ann\nann-b ann\nbob-a bob\nbob-b bob\n",
    }
    for name, text in lists.items():
        (src / name).write_text(text)
    return src, x


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def samples(entry):
    return np.rint(read_audio(entry, 16000) * 32768).astype(np.int16)


@pytest.mark.parametrize("nj", [1, 2])
def test_segments(kaldi, tmp_path, nj):
    src, x = kaldi
    before = snapshot(tmp_path / "a recipe")
    made = import_kaldi(src, tmp_path / "out put", lexicon=LEXICON, wav_root=src.parents[1], nj=nj)
    assert snapshot(tmp_path / "a recipe") == before
    out = tmp_path / "out put"
    assert made == Prepared(
        {out: Contents(4, 2)},
        notes=(
            f"{out}: 4 cut out of recordings, as FLAC",
            f"{out}: every word is in the lexicon",
        ),
    )
    data = DataDir.read(out)
    expected = {
        "ann-a": x[0][:8000],
        "ann-b": x[0][20000:],
        "bob-a": x[1][4800:16000],
        "bob-b": x[2],
    }
    assert data.wav.keys() == expected.keys()
    for utt, piece in expected.items():
        assert np.array_equal(samples(data.wav[utt]), piece)
    assert data.spk1 == data.wav
    assert data.phn["bob-a"] == "W AH N T UW"
    assert data.text["bob-a"] == "one two"
    assert validate(tmp_path / "out put", 16000) == sum(map(len, expected.values()))


def test_clean_references_are_cut_too(kaldi, tmp_path):
    src, x = kaldi
    (src / "spk1.scp").write_text("rec0 rec2.wav\nrec1 rec2.wav\nrec2 rec2.wav\n")
    (src / "phn").write_text("ann-a W\nann-b T\nbob-a W T\nbob-b T\n")
    made = import_kaldi(src, tmp_path / "out", wav_root=src.parents[1])
    assert made.notes == (f"{tmp_path}/out: 4 cut out of recordings, as FLAC",)
    data = DataDir.read(tmp_path / "out")
    assert np.array_equal(samples(data.spk1["ann-a"]), x[2][:8000])
    assert np.array_equal(samples(data.wav["ann-a"]), x[0][:8000])
    assert data.phn["bob-a"] == "W T"


def test_without_segments_audio_stays_where_it_is(kaldi, tmp_path, monkeypatch):
    src, x = kaldi
    (src / "segments").unlink()
    (src / "text").write_text("rec0 one\nrec1 one\nrec2 two\n")
    (src / "utt2spk").write_text("rec0 ann\nrec1 rec1\nrec2 bob\n")
    made = import_kaldi(src, tmp_path / "out", lexicon=LEXICON, wav_root=src.parents[1])
    assert made.notes[0] == f"{tmp_path}/out: 2 renamed, their speaker in front"
    data = DataDir.read(tmp_path / "out")
    assert list(data.wav) == ["ann-rec0", "bob-rec2", "rec1"]
    assert not (tmp_path / "out" / "audio").exists()
    for utt, wave in zip(("ann-rec0", "rec1", "bob-rec2"), x, strict=True):
        assert np.array_equal(samples(data.wav[utt]), wave)
    # Relative paths start at the current folder unless wav_root says otherwise.
    monkeypatch.chdir(src.parents[1])
    import_kaldi(src, tmp_path / "here", lexicon=LEXICON)
    monkeypatch.chdir(tmp_path)
    here = DataDir.read(tmp_path / "here").wav
    assert np.array_equal(samples(here["ann-rec0"]), x[0])
    assert here["bob-rec2"] == data.wav["bob-rec2"]


@pytest.mark.parametrize("with_segments", [True, False])
def test_a_channel_of_stereo_recordings(kaldi, tmp_path, with_segments):
    src, x = kaldi
    root, out = src.parents[1], tmp_path / "out"
    options = {"lexicon": LEXICON, "wav_root": root}
    stereo = np.stack([x[2], x[2][::-1]], 1)
    soundfile.write(root / "both.wav", stereo, 16000)
    if not with_segments:
        (src / "segments").unlink()
        write_table(src / "wav.scp", dict.fromkeys(read_table(src / "text"), "both.wav"))
    else:
        write_table(src / "wav.scp", dict.fromkeys(("rec0", "rec1", "rec2"), "both.wav"))
        with pytest.raises(InputError, match=r"both.wav: 2 channels, .*--channel N"):
            import_kaldi(src, out, **options)
    for channel, expected in ((1, x[2]), (2, x[2][::-1])):
        import_kaldi(src, out, channel=channel, **options)
        assert np.array_equal(samples(DataDir.read(out).wav["bob-b"]), expected)
    import_kaldi(src, out, channel=0, **options)
    assert np.abs(samples(DataDir.read(out).wav["bob-b"]) - stereo.mean(1)).max() <= 1
    with pytest.raises(InputError, match=r"both.wav: no channel 3: it has 2"):
        import_kaldi(src, out, channel=3, **options)


def test_channels_that_a_kaldi_directory_names(kaldi, tmp_path):
    src, x = kaldi
    root, out = src.parents[1], tmp_path / "out"
    soundfile.write(root / "both.wav", np.stack([x[2], x[2][::-1]], 1), 16000)
    write_table(src / "wav.scp", {"rec0": "rec0.flac", "rec1": "both.wav", "rec2": "both.wav"})
    channels = src / "reco2file_and_channel"
    channels.write_text("rec0 rec0 B\nrec1 both B\nrec2 both A\n")

    def imported(**options):
        import_kaldi(src, out, lexicon=LEXICON, wav_root=root, **options)
        return samples(DataDir.read(out).wav["bob-b"])

    assert np.array_equal(imported(), x[2])
    assert np.array_equal(samples(DataDir.read(out).wav["ann-a"]), x[0][:8000])
    edit(src / "segments", "rec2 0 2", "rec2 0 2 1")
    assert np.array_equal(imported(), x[2][::-1])
    (src / "segments").unlink()
    write_table(src / "wav.scp", dict.fromkeys(read_table(src / "text"), "both.wav"))
    channels.write_text("ann-a both A\nbob-b both 2\n")
    assert np.array_equal(imported(channel=1), x[2][::-1])
    with pytest.raises(InputError, match=r"both.wav: 2 channels, .*--channel N"):
        imported()
    channels.write_text("bob-b both left\n")
    with pytest.raises(InputError, match=r"bob-b: channel left: must be A, B, .*or 1, 2"):
        imported()


def test_other_rates_are_kept(kaldi, tmp_path):
    src, x = kaldi
    soundfile.write(src.parents[1] / "rec0.flac", x[0], 8000)
    import_kaldi(src, tmp_path / "out", lexicon=LEXICON, wav_root=src.parents[1])
    wave, rate = soundfile.read(tmp_path / "out/audio/ann-a.flac", dtype="int16")
    assert rate == 8000
    assert np.array_equal(wave, x[0][:4000])


def test_an_end_a_little_after_the_recording(kaldi, tmp_path):
    src, x = kaldi
    edit(src / "segments", "rec2 0 2", "rec2 1 2.08")
    made = import_kaldi(src, tmp_path / "out", lexicon=LEXICON, wav_root=src.parents[1])
    assert np.array_equal(samples(str(tmp_path / "out/audio/bob-b.flac")), x[2][16000:])
    assert f"{tmp_path / 'out'}: 1 cut at their recording's end, before their own" in str(made)
    with pytest.raises(InputError, match=r"bob-b: from 1 to 2.08 s .*--max_overshoot SECONDS"):
        import_kaldi(
            *(src, tmp_path / "out"),
            **{"lexicon": LEXICON, "wav_root": src.parents[1], "max_overshoot": 0.05},
        )


BAD = {
    "beyond": ("segments", "rec2 0 2", "rec2 0 2.2", "bob-b: from 0 to 2.2 s of rec2, which has"),
    "starts beyond": ("segments", "rec2 0 2", "rec2 2 -1", "bob-b: from 2 to 2 s of rec2"),
    "backwards": ("segments", "1.25 -1", "1.25 0.5", "ann-b: from 1.25 to 0.5 s: correct"),
    "negative": ("segments", "0.0 0.5", "-0.5 0.5", "ann-a: from -0.5"),
    "nan": ("segments", "0.0 0.5", "0.0 nan", "ann-a: from 0.0 to nan"),
    "channel": ("segments", "rec2 0 2", "rec2 0 2 1", "rec2.wav.*: no channel 2: it has 1"),
    "not a channel": ("segments", "rec2 0 2", "rec2 0 2 A", "bob-b: 'rec2 0 2 A' must be a record"),
    "no recording": ("segments", "rec2 0", "rec9 0", "bob-b: no recording rec9"),
    "no transcript": ("text", "bob-b TWO\n", "", "no transcript for utterance bob-b"),
    "word": ("text", "ann-b two", "ann-b six", "utterance ann-b: 'SIX'"),
    "speaker": ("utt2spk", "bob-b bob\n", "", "bob-b"),
    "slash": ("utt2spk", "bob-b bob\n", "bob-b b/b\n", "id b/b-bob-b: it names a file"),
    "audio": ("wav.scp", "rec0.flac", "none.flac", "no such audio file"),
    "command": ("wav.scp", "cat rec2.wav", "cat none.wav", "exit status"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_kaldi_directories(kaldi, tmp_path, case):
    src, _ = kaldi
    name, old, new, message = BAD[case]
    edit(src / name, old, new)
    with pytest.raises(InputError, match=message):
        import_kaldi(src, tmp_path / "out", lexicon=LEXICON, wav_root=src.parents[1])
    assert not (tmp_path / "out").exists()


def test_bad_options(kaldi, tmp_path):
    src, _ = kaldi
    with pytest.raises(InputError, match=r"phn: no phonemes, and no lexicon .*--lexicon"):
        import_kaldi(src, tmp_path / "out")
    with pytest.raises(InputError, match="would overwrite the source"):
        import_kaldi(src, src, lexicon=LEXICON)
    with pytest.raises(InputError, match="no such Kaldi directory"):
        import_kaldi(tmp_path / "none", tmp_path / "out", lexicon=LEXICON)


@pytest.fixture
def cuts(tmp_path):
    """Cuts with offsets of two recordings, one of them of two channels, and their samples."""
    lhotse = pytest.importorskip("lhotse")
    x = [pcm(i, 32000) for i in range(3)]
    soundfile.write(tmp_path / "mono.wav", x[0], 16000)
    soundfile.write(tmp_path / "stereo.flac", np.stack(x[1:], 1), 16000)
    recordings = [
        lhotse.Recording.from_file(tmp_path / "mono.wav"),
        lhotse.Recording.from_file(tmp_path / "stereo.flac"),
    ]

    def cut(name, recording, start, duration, channel, *supervisions):
        return lhotse.MonoCut(
            *(name, start, duration, channel),
            recording=recordings[recording],
            supervisions=[
                lhotse.SupervisionSegment(
                    *(utt, recordings[recording].id, begin, length),
                    **{"text": text, "speaker": speaker},
                )
                for utt, begin, length, text, speaker in supervisions
            ],
        )

    return [
        cut("c1", 0, 0.5, 1.0, 0, ("ann-1", 0.0, 0.4, "one", "ann"), ("2", 0.5, 0.5, "two", "ann")),
        cut("c2", 1, 0.25, 1.5, 1, ("bob-1", 0.1, 1.3, "one  two", "bob")),
        cut("c3", 1, 0.0, 2.0, 0, ("x", 0.0, 2.0, "two", None)),
    ], x


def save(cuts, path):
    from lhotse import CutSet

    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.mark.parametrize("nj", [1, 2])
def test_cuts(cuts, tmp_path, nj):
    cuts, x = cuts
    path = save(cuts, tmp_path / "cuts.jsonl.gz")
    made = import_cuts(path, tmp_path / "out", lexicon=LEXICON, nj=nj)
    out = tmp_path / "out"
    assert str(made).splitlines() == [
        f"{out}: 4 utterances of 3 speakers",
        f"{out}: 4 cut out of recordings, as FLAC",
        f"{out}: 1 renamed, their speaker in front",
        f"{out}: every word is in the lexicon",
    ]
    data = DataDir.read(tmp_path / "out")
    expected = {
        "ann-1": x[0][8000:14400],
        "ann-2": x[0][16000:24000],
        "bob-1": x[2][5600:26400],
        "x": x[1],
    }
    assert data.wav.keys() == expected.keys()
    for utt, piece in expected.items():
        assert np.array_equal(samples(data.wav[utt]), piece)
    assert data.text["bob-1"] == "one two"
    assert data.utt2spk["x"] == "x"
    assert validate(tmp_path / "out", 16000)


def test_what_was_asked_of_cuts_is_done(cuts, tmp_path):
    """The oracle: lhotse's own trimming and loading."""
    cuts, _ = cuts
    cut = cuts[0].perturb_speed(1.1)
    path = save([cut], tmp_path / "cuts.jsonl.gz")
    import_cuts(path, tmp_path / "out", lexicon=LEXICON)
    data = DataDir.read(tmp_path / "out")
    trimmed = list(cut.trim_to_supervisions(keep_overlapping=False))
    assert len(trimmed) == len(data.wav) == 2
    for utt, one in zip(data.wav, trimmed, strict=True):
        reference = one.load_audio()[0]
        assert np.abs(read_audio(data.wav[utt], 16000) - reference).max() <= 0.51 / 32768
        assert len(reference) < 8000


def test_supervisions_a_little_after_their_cut_and_relative_paths(cuts, tmp_path):
    (c1, _, c3), x = cuts
    c3 = c3.truncate(duration=1.92)
    c1.recording.sources[0].source = "mono.wav"
    path = save([c1, c3], tmp_path / "cuts.jsonl.gz")
    made = import_cuts(path, tmp_path / "out", lexicon=LEXICON, wav_root=tmp_path)
    data = DataDir.read(tmp_path / "out")
    assert np.array_equal(samples(data.wav["x"]), x[1][: round(1.92 * 16000)])
    assert np.array_equal(samples(data.wav["ann-1"]), x[0][8000:14400])
    assert f"{tmp_path / 'out'}: 1 cut at their recording's end, before their own" in str(made)


def test_a_channel_of_cuts_of_several(cuts, tmp_path):
    import lhotse

    (c1, _, c3), x = cuts
    supervisions = [c3.supervisions[0]]
    both = lhotse.MultiCut("both", 0.0, 2.0, [0, 1], supervisions, recording=c3.recording)
    path = save([c1, both], tmp_path / "cuts.jsonl.gz")
    stereo = np.stack(x[1:])
    for channel, expected in ((1, x[1]), (2, x[2]), (0, stereo.mean(0))):
        import_cuts(path, tmp_path / "out", lexicon=LEXICON, channel=channel)
        data = DataDir.read(tmp_path / "out")
        assert np.abs(samples(data.wav["x"]) - expected).max() <= (0 if channel else 1)
        assert np.array_equal(samples(data.wav["ann-1"]), x[0][8000:14400])
    for channel, message in (
        (None, "MultiCut both: 2 channels, one wanted: .*--channel N"),
        (3, "MultiCut both: no channel 3: it has 2"),
    ):
        with pytest.raises(InputError, match=message):
            import_cuts(path, tmp_path / "out", lexicon=LEXICON, channel=channel)


def test_manifests_that_are_not_of_cuts(cuts, tmp_path):
    import lhotse

    (c1, *_), _ = cuts
    path = tmp_path / "some.jsonl.gz"
    for manifest in (
        lhotse.RecordingSet.from_recordings([c1.recording]),
        lhotse.SupervisionSet.from_segments(c1.supervisions),
    ):
        path.unlink(missing_ok=True)
        manifest.to_file(path)
        with pytest.raises(InputError, match=r"a manifest of \w+s, .*lhotse cut simple"):
            import_cuts(path, tmp_path / "out", lexicon=LEXICON)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(InputError, match="no cuts in it"):
        import_cuts(path, tmp_path / "out", lexicon=LEXICON)


def test_bad_cuts(cuts, tmp_path, monkeypatch):
    from lhotse import MonoCut

    (c1, c2, c3), _ = cuts
    path = tmp_path / "cuts.jsonl.gz"

    def refused(cuts, message, lexicon=LEXICON):
        save(cuts, path)
        with pytest.raises(InputError, match=message):
            import_cuts(path, tmp_path / "out", lexicon=lexicon)
        assert not (tmp_path / "out").exists()

    refused([c1, c1.with_id("again")], "supervision ann-1 is there twice")
    refused([c1.mix(c2)], "MixedCut .*: only MonoCut and MultiCut are read")
    refused([MonoCut("c", 0, 1, 0, recording=c1.recording)], "cut c: no supervision")
    refused([c3.truncate(duration=1.0)], "supervision x: from 0 to 2 s of a cut of 1 s")
    refused(
        [c3.map_supervisions(lambda s: s.transform_text(lambda text: ""))], "supervision x: no text"
    )
    refused([c1], "no phonemes, and no lexicon .*--lexicon", None)
    refused([c1], "utterance ann-1: 'ONE'", Lexicon({"TWO": "T UW"}, g2p=False))
    (tmp_path / "mono.wav").unlink()
    refused([c1], "cut c1: its audio can't be read")
    path.write_text("hello")
    with pytest.raises(InputError, match="not a manifest of cuts"):
        import_cuts(path, tmp_path / "out", lexicon=LEXICON)
    with pytest.raises(InputError, match="no such file"):
        import_cuts(tmp_path / "none.jsonl.gz", tmp_path / "out", lexicon=LEXICON)
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(InputError, match="pip install lhotse"):
        import_cuts(path, tmp_path / "out", lexicon=LEXICON)
