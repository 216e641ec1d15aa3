"""QUESST 2014, spoken queries and documents of MediaEval, for query-by-example search.

X. Anguera et al., *QUESST2014: Evaluating query-by-example speech search in a zero-resource setting
with real-life queries*, ICASSP 2015; https://speech.fit.vutbr.cz/files/quesst14Database.tgz. As
SUPERB does (S3PRL's ``quesst14_dtw``), the English queries are searched in the English documents;
and as there, the score is that of the whole evaluation, in which the other queries and documents
count as never found.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posinv.corpora.prepared import Contents, Prepared
from posinv.corpora.search import write_search
from posinv.data.audio import SAMPLING_RATE, read_audio, write_audio
from posinv.data.files import atomic_folder, file_digest
from posinv.data.parallel import map_parallel
from posinv.data.tables import write_table
from posinv.errors import InputError

ENGLISH = "nnenglish"
GAIN = 10 ** (-3 / 20)  # S3PRL's -3 dB


def prepare(src: Path | str, out: Path | str, *, split: str, nj: int = 1) -> Prepared:
    """Write the folder of a search, see :mod:`posinv.corpora.search`, with its audio at 16 kHz.

    Args:
        src: the folder ``quesst14Database``, with ``Audio``, ``dev_queries``, ``eval_queries`` and
            ``scoring``.
        out: the folder to write, atomically; an earlier one is replaced. Its name is the name of
            the test set.
        split: ``dev`` or ``eval``: the queries.
        nj: number of processes.

    Raises:
        InputError: another folder, a list of another form, audio that is missing or cannot be read.
    """
    src, out = Path(src).absolute(), Path(out)
    scoring = src / "scoring"
    queries = _read_keys(scoring / f"language_key_{split}.lst", src)
    documents = _read_keys(scoring / "language_key_utterances.lst", src)
    truth = scoring / f"groundtruth_quesst14_{split}" / f"quesst14_{split}.rttm"
    relevant = set(_read_rttm(truth))
    for query, document in relevant:
        if query not in queries or document not in documents:
            raise InputError(
                f"{truth}: {query} or {document} is in no list of {scoring}: unpack it again"
            )
    keys = queries | documents
    searched = {name: path for name, (path, language) in keys.items() if language == ENGLISH}
    with atomic_folder(out, replaces="queries.scp") as fresh:
        (fresh / "audio").mkdir()

        def convert(name: str) -> tuple[int, str]:
            x = GAIN * read_audio(str(searched[name]), SAMPLING_RATE, resample=True)
            x = x / max(1.0, np.abs(x).max())  # resampling may overshoot
            path = fresh / "audio" / f"{name}.flac"
            write_audio(path, x, SAMPLING_RATE)
            return len(x), file_digest(path)

        lengths, digests = zip(*map_parallel(convert, searched, nj), strict=True)
        audio = {name: str(out / "audio" / f"{name}.flac") for name in searched}
        write_search(
            fresh,
            {name: audio[name] for name in queries if name in audio},
            {name: audio[name] for name in documents if name in audio},
            {name: out.name for name in documents if name in audio},
            relevant,
            dict(zip(searched, digests, strict=True)),
        )
        kinds = {name: "query" for name in queries} | {name: "document" for name in documents}
        others = {name: kind for name, kind in kinds.items() if name not in audio}
        write_table(fresh / "unsearched", others)
    contents = Contents(len(searched), minutes=sum(lengths) / SAMPLING_RATE / 60)
    note = f"{out}: of other languages, so not searched but counted: {len(others)} recordings"
    return Prepared({out: contents}, notes=(note,))


def _read_keys(path: Path, src: Path) -> dict[str, tuple[Path, str]]:
    """Read lines ``<folder>/<path in src> <language>``: id to file and language."""
    keys = {}
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"\s*[^/\s]*/(\S+)\s+(\S+)\s*", line)
        if not match:
            raise InputError(
                f"{path}: line {number}: '{line}': must be '<folder>/<path> <language>'"
            )
        keys[Path(match[1]).stem] = src / match[1], match[2]
    if not any(language == ENGLISH for _, language in keys.values()):
        raise InputError(f"{path}: nothing in it is {ENGLISH}: unpack the archive again")
    return keys


def _read_rttm(path: Path) -> Iterator[tuple[str, str]]:
    """Read pairs of a query and a document that it is in, from the LEXEME lines."""
    for line in _lines(path):
        if match := re.match(r"LEXEME\s+(quesst14_\d+)\s.*?(quesst14_(?:dev|eval)_\d+)\b", line):
            yield match[2], match[1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: QUESST14 in db.sh must be the folder quesst14Database"
        ) from error
