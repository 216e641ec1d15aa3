"""The option ``--align`` of format_data and validate_data."""

import argparse
from pathlib import Path
from typing import cast, get_args

from posinv.data.directory import TokenKind
from posinv.data.files import read_yaml
from posinv.errors import InputError


def add_align(parser: argparse.ArgumentParser) -> None:
    """Add ``--align``, whose value is a list of kinds of tokens and frames that a head joins."""
    parser.add_argument(
        "--align",
        nargs="+",
        type=_kind_and_frames,
        default=[],
        metavar="KIND[=CONFIG]",
        help="kinds of tokens (phn, char, word) in which CTC must be able to align each "
        "transcript; with the configuration of the head, whose encoder may join (stack) frames",
    )


def _kind_and_frames(text: str) -> tuple[TokenKind, int]:
    kind, _, path = text.partition("=")
    if kind not in get_args(TokenKind):
        raise argparse.ArgumentTypeError(f"{text}: must begin with one of word, char, phn")
    try:
        config = read_yaml(Path(path), "configuration") if path else None
    except InputError as error:  # argparse would only call it invalid
        raise argparse.ArgumentTypeError(str(error)) from error
    conf = config.get("encoder_conf") if isinstance(config, dict) else None
    return cast(TokenKind, kind), conf.get("stack", 1) if isinstance(conf, dict) else 1
