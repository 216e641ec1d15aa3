"""Train a sentencepiece model on the transcripts of a data directory."""

import argparse
import tempfile
from pathlib import Path

import sentencepiece

from posinv.bin.cli import run
from posinv.data.tables import read_table
from posinv.errors import InputError


def main() -> None:
    """Write ``--out``, a unigram model of ``--size`` pieces."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="Kaldi-style text")
    parser.add_argument("--size", type=int, default=100, help="number of pieces")
    parser.add_argument("--out", type=Path, required=True, help="the model")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        prefix = Path(scratch, "bpe")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(read_table(args.text).values()),
                model_prefix=str(prefix),
                vocab_size=args.size,
                character_coverage=1.0,
            )
        except RuntimeError as error:
            raise InputError(f"--size {args.size}: sentencepiece: {error}") from error
        prefix.with_suffix(".model").replace(args.out)


if __name__ == "__main__":
    run(main)
