"""Train a sentencepiece model on the transcripts of a data directory."""

import io
from pathlib import Path

import sentencepiece

from posinv.bin.cli import command_parser, run
from posinv.data.files import write_atomic
from posinv.data.tables import read_table
from posinv.errors import InputError


def main() -> None:
    """Write ``--out``, a unigram model of ``--size`` pieces."""
    parser = command_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="Kaldi-style text")
    parser.add_argument("--size", type=int, default=100, help="number of pieces")
    parser.add_argument("--out", type=Path, required=True, help="the model")
    args = parser.parse_args()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(read_table(args.text).values()),
            model_writer=model,
            vocab_size=args.size,
            character_coverage=1.0,
        )
    except RuntimeError as error:
        raise InputError(f"--size {args.size}: sentencepiece: {error}") from error
    write_atomic(args.out, model.getvalue())


if __name__ == "__main__":
    run(main)
