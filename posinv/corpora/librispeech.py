"""LibriSpeech (Panayotov et al., ICASSP 2015, CC BY 4.0), as its archives unpack."""

import re
from pathlib import Path

from posinv.corpora.lexicon import Lexicon
from posinv.corpora.prepared import Contents, Prepared
from posinv.data.directory import DataDir
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel
from posinv.errors import InputError


def prepare(
    src: Path | str, out: Path | str, *, subset: str, lexicon: Lexicon, nj: int = 1
) -> Prepared:
    """Write a data directory of a subset. Utterance and speaker ids are LibriSpeech's own.

    The audio isn't opened: ``wav.scp`` names the FLAC files where they are.

    Args:
        src: the folder ``LibriSpeech``, of
            ``<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<utterance>.flac`` and
            ``<speaker>-<chapter>.trans.txt``.
        out: the data directory, written atomically; an earlier one is replaced.
        subset: such as ``train-clean-100``.
        lexicon: for the phonemes.
        nj: number of processes that look into chapters.

    Raises:
        InputError: another folder; no utterances; a FLAC file without a transcript, or the other
            way round; a file of another name; a word without phonemes.
    """
    root, out = _find(Path(src), subset), Path(out)
    chapters = sorted(path for path in root.glob("*/*") if path.is_dir())
    wav: dict[str, str] = {}
    text: dict[str, str] = {}
    with atomic_folder(out, replaces="wav.scp") as fresh:
        for audio, transcripts in map_parallel(_read_chapter, chapters, nj):
            wav |= audio
            text |= transcripts
        if not wav:
            raise InputError(f"{root}: no <speaker>/<chapter>/*.flac in it: unpack it again")
        try:
            phn = lexicon.transcribe_all(dict(sorted(text.items())))
        except InputError as error:
            raise InputError(f"{root}: {error}") from error
        utt2spk = {utt: utt.partition("-")[0] for utt in wav}
        data = DataDir(wav, wav, text, phn, utt2spk)
        data.write(fresh)
    return Prepared({out: Contents.of(data)}, notes=(f"{out}: {lexicon.describe_predicted()}",))


def _find(librispeech: Path, subset: str) -> Path:
    if (librispeech / subset).is_dir():
        return (librispeech / subset).absolute()
    for place in (librispeech / "LibriSpeech", librispeech.absolute().parent):
        if (place / subset).is_dir():
            raise InputError(f"{librispeech}: {subset} isn't in it but in {place}: name that one")
    raise InputError(f"{librispeech}: no folder {subset} in it: name the folder LibriSpeech")


def _read_chapter(chapter: Path) -> tuple[dict[str, str], dict[str, str]]:
    # Utterance id to FLAC file, and to words.
    prefix = f"{chapter.parent.name}-{chapter.name}"
    listing = chapter / f"{prefix}.trans.txt"
    audio = {path.stem: str(path) for path in sorted(chapter.glob("*.flac"))}
    for utt in audio:
        if not re.fullmatch(rf"{re.escape(prefix)}-\d+", utt):
            raise InputError(f"{audio[utt]}: not named {prefix}-<number>.flac: unpack it again")
    words: dict[str, str] = {}
    lines = listing.read_text(encoding="utf-8-sig").splitlines() if listing.is_file() else []
    for number, line in enumerate(lines, 1):
        utt, _, said = line.partition(" ")
        if not said.strip() or utt in words:
            what = f"{utt} is there twice" if utt in words else f"no words of '{utt}'"
            raise InputError(f"{listing}: line {number}: {what}: unpack the archive again")
        words[utt] = " ".join(said.split())
    if missing := audio.keys() - words.keys():
        raise InputError(
            f"{listing}: no transcript of {min(missing)} ({len(missing)} such): unpack it again"
        )
    if missing := words.keys() - audio.keys():
        raise InputError(
            f"{listing}: no FLAC file of {min(missing)} ({len(missing)} such): unpack it again"
        )
    return audio, words
