"""CMU AN4, the "census" corpus, in its original layout: NIST SPHERE files, transcripts, dictionary.

``etc/an4_{train,test}.transcription`` has a line an utterance, ``<s> WORDS </s> (an251-fash-b)`` in
training and ``WORDS (cen8-fcaw-b)`` in test; the audio is ``wav/an4_clstk/fash/an251-fash-b.sph``
and ``wav/an4test_clstk/...``, the pronunciations ``etc/an4.dic``. Test speakers aren't in training.
"""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from posinv.augment.draws import generator
from posinv.corpora.lexicon import Lexicon
from posinv.corpora.prepared import Contents, Prepared
from posinv.data.directory import DataDir
from posinv.data.files import atomic_folder
from posinv.errors import InputError

AUDIO = {"train": "an4_clstk", "test": "an4test_clstk"}  # folders of wav/


def read_transcripts(path: Path | str) -> dict[str, str]:
    """Read a ``.transcription`` file: words by file id, without sentence marks.

    Utterances of no words are left out.

    Raises:
        InputError: no such file, a line without an id ``a-speaker-b`` in parentheses at its end,
            or an id twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file: set AN4 to the folder that has etc/ and wav/")
    words: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(?:<s>)?(.*?)(?:</s>)?\s*\((\w+-\w+-\w+)\)", line.strip())
        if not match:
            raise InputError(
                f"{path}: line {number}: must end in an id such as (an251-fash-b): mend it"
            )
        if match[2] in words:
            raise InputError(f"{path}: line {number}: {match[2]} is there twice: remove one")
        words[match[2]] = " ".join(match[1].split())
    return {name: said for name, said in words.items() if said}


def draw_dev_speakers(speakers: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Draw the share of the training speakers that become the validation set, at least one.

    Raises:
        InputError: a fraction that isn't between 0 and 1, or nobody would be left.
    """
    speakers = sorted(speakers)
    if not 0 < fraction < 1:
        raise InputError(f"--dev_fraction {fraction}: must be between 0 and 1")
    count = max(1, round(fraction * len(speakers)))
    if count >= len(speakers):
        raise InputError(
            f"{len(speakers)} training speakers, {count} of them for the validation set: nobody is "
            "left: lower --dev_fraction, or use more of the corpus"
        )
    order = generator(seed, "AN4 validation speakers").permutation(len(speakers))
    return {speakers[i] for i in order[:count]}


def prepare(
    src: Path | str, out: Path | str, *, dev_fraction: float = 0.1, seed: int = 0
) -> Prepared:
    """Write ``out/train``, ``out/dev`` and ``out/test``, which point at the SPHERE files.

    Validation speakers are drawn from the training set's (:func:`draw_dev_speakers`).

    Args:
        src: the corpus, with ``etc`` and ``wav``.
        out: parent of the three data directories; earlier ones are replaced.
        dev_fraction: share of the training speakers that become the validation set.
        seed: of that draw.

    Raises:
        InputError: as :func:`read_transcripts` and :func:`draw_dev_speakers`; a transcript without
            audio; a word that isn't in the dictionary.
    """
    src = Path(src).resolve()
    left_out: list[Path] = []
    found: dict[str, dict[str, tuple[Path, str]]] = {}  # split: id: audio, words
    for split, folder in AUDIO.items():
        transcripts = read_transcripts(src / "etc" / f"an4_{split}.transcription")
        audio = {path.stem: path for path in sorted((src / "wav" / folder).rglob("*.sph"))}
        missing = sorted(transcripts.keys() - audio.keys())
        if missing:
            raise InputError(
                f"{src / 'wav' / folder}: no {missing[0]}.sph, which has a transcript "
                f"({len(missing)} such): get the whole corpus"
            )
        left_out += [path for name, path in audio.items() if name not in transcripts]
        found[split] = {name: (audio[name], said) for name, said in transcripts.items()}
    dev_speakers = draw_dev_speakers(
        {_speaker(name) for name in found["train"]}, dev_fraction, seed
    )
    found["dev"] = {
        name: found["train"].pop(name)
        for name in sorted(found["train"])
        if _speaker(name) in dev_speakers
    }
    lexicon = Lexicon.read(src / "etc" / "an4.dic", g2p=False)
    made = {}
    with ExitStack() as stack:
        for split, utterances in found.items():
            fresh = stack.enter_context(atomic_folder(Path(out) / split, replaces="wav.scp"))
            wav: dict[str, str] = {}
            text: dict[str, str] = {}
            utt2spk: dict[str, str] = {}
            for name, (path, said) in utterances.items():
                first, speaker, last = name.split("-")
                utt = f"{speaker}-{first}-{last}"
                wav[utt], text[utt], utt2spk[utt] = str(path), said, speaker
            data = DataDir(wav, wav, text, lexicon.transcribe_all(text), utt2spk)
            data.write(fresh)
            made[Path(out) / split] = Contents.of(data)
    return Prepared(made, tuple(left_out))


def _speaker(name: str) -> str:
    return name.split("-")[1]
