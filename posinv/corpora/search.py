"""Folders for query-by-example search: which spoken queries are searched in which documents.

A folder holds ``queries.scp`` and ``documents.scp`` (``<id> <audio>``, 16 kHz), ``utt2set`` (the
test set of each document), ``relevance`` (a line ``<query> <document>`` for each pair of which the
query is in the document) and ``utt2digest`` (a digest of each audio file). ``unsearched`` may name
queries and documents that count as never found (``<id> query``, ``<id> document``).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from posinv.data.files import atomic_folder
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError
from posinv.scoring.text import require_same_ids


def write_search(
    folder: Path,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    sets: Mapping[str, str],
    relevant: Iterable[tuple[str, str]],
    digests: Mapping[str, str],
) -> None:
    """Write the lists of a search into a folder that exists.

    Args:
        folder: where to.
        queries: audio of each query.
        documents: audio of each document.
        sets: test set of each document.
        relevant: pairs of a query and a document that it is in.
        digests: of each query's and each document's audio.
    """
    write_table(folder / "queries.scp", queries)
    write_table(folder / "documents.scp", documents)
    write_table(folder / "utt2set", sets)
    write_table(folder / "utt2digest", digests)
    lines = [f"{query} {document}\n" for query, document in sorted(relevant)]
    (folder / "relevance").write_text("".join(lines), encoding="utf-8")


def search_in_transcripts(
    queries: Path | str, documents: Path | str, out: Path | str
) -> dict[str, int]:
    """Make a search of queries in documents, both with transcripts.

    A query is in a document if its words stand in the document's transcript, one after the other.

    Args:
        queries: folder with ``wav.scp``, ``text`` and ``utt2digest``, as ``format_data`` leaves it.
        documents: likewise, and with ``utt2set``.
        out: the folder to write, atomically; an earlier one is replaced.

    Returns:
        For each query, how many documents it is in.

    Raises:
        InputError: a bad list; ids that don't match; a query and a document of the same id; no
            query is in any document.
    """
    queries, documents, out = Path(queries), Path(documents), Path(out)
    names = "wav.scp", "text", "utt2digest"
    query_wav, query_text, query_digest = (read_table(queries / name) for name in names)
    wav, text, digest = (read_table(documents / name) for name in names)
    require_same_ids(query_wav, query_text, queries / "wav.scp", queries / "text")
    require_same_ids(wav, text, documents / "wav.scp", documents / "text")
    if clash := query_wav.keys() & wav.keys():
        raise InputError(f"{queries}: {min(clash)} is a document, too: leave it out of one of them")
    # Spaces at both ends, so that only whole words match.
    said = {name: f" {' '.join(words.split())} " for name, words in text.items()}
    found = {
        query: [name for name in said if f" {' '.join(words.split())} " in said[name]]
        for query, words in query_text.items()
    }
    if not any(found.values()):
        raise InputError(
            f"{queries / 'text'}: no query's words are in a transcript of {documents / 'text'}: "
            "choose words that the test set has"
        )
    with atomic_folder(out, replaces="queries.scp") as fresh:
        write_search(
            fresh,
            query_wav,
            wav,
            read_table(documents / "utt2set"),
            ((query, name) for query, names in found.items() for name in names),
            query_digest | digest,
        )
    return {query: len(names) for query, names in found.items()}
