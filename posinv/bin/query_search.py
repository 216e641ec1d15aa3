"""Find spoken queries in spoken documents with the features of an SSL model's layer; score that.

Subsequence DTW, as S3PRL's quesst14_dtw: no training. With --enh_config and --enh_model, the SSL
model hears queries and documents through that enhancement model, as the front end enh_ssl does.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio, refuse_pipes
from posinv.data.device import pick_device
from posinv.data.files import write_atomic
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.scoring.query_search import DISTANCES, score_search
from posinv.ssl.upstream import SSLUpstream


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--ssl", required=True, help="the SSL model: hub name or folder")
    add("--enh_config", type=Path, help="config.yaml of an enhancement model in front of it")
    add("--enh_model", type=Path, help="that model's checkpoint")
    add("--layer", type=int, default=-1, help="hidden state, from 0; -1: the last")
    add("--queries", type=Path, required=True, help="'<query> <audio>' lines, 16 kHz")
    add("--documents", type=Path, required=True, help="'<document> <audio>' lines, 16 kHz")
    add("--relevance", type=Path, required=True, help="a '<query> <document>' line a relevant pair")
    add("--utt2set", type=Path, required=True, help="'<document> <test set>' lines")
    add("--unsearched", type=Path, help="'<id> query' and '<id> document' lines: never found")
    add("--distance", choices=DISTANCES, default="cosine_exp", help="of two frames")
    add(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bring each dimension to mean 0 and variance 1 over queries and documents",
    )
    add(
        "--allow_pipes",
        action="store_true",
        help="run the commands in lists; without it, they are named and refused",
    )
    add("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU, for the features")
    add("--nj", type=int, default=1, help="number of processes of the search")
    add(
        "--out",
        type=Path,
        required=True,
        help="JSON file for MTWV and ATWV of each set; the score of each pair goes into .tsv "
        "beside it",
    )
    args = parser.parse_args()
    if (args.enh_config is None) != (args.enh_model is None):
        raise InputError("--enh_config and --enh_model: both are needed, or neither")
    tables = [read_table(scp) for scp in (args.queries, args.documents)]
    if not args.allow_pipes:
        for table, scp in zip(tables, (args.queries, args.documents), strict=True):
            refuse_pipes(table, scp)
    encode = encoder(args)
    queries, documents = (
        {
            name: encode(entry, f"{scp}: {name}")
            for name, entry in tqdm(table.items(), desc=scp.name, unit="utterance")
        }
        for table, scp in zip(tables, (args.queries, args.documents), strict=True)
    )
    results, rows = score_search(
        queries,
        documents,
        read_table(args.utt2set),
        args.relevance,
        args.unsearched,
        args.distance,
        args.normalise,
        args.nj,
    )
    lines = ["query\tdocument\tset\trelevant\tscore\n"]
    lines += [f"{q}\t{d}\t{s}\t{truth:d}\t{score:.4f}\n" for q, d, s, truth, score in rows]
    write_atomic(args.out.with_suffix(".tsv"), "".join(lines))
    write_atomic(args.out, json.dumps(results, indent=2) + "\n")


def encoder(args: argparse.Namespace) -> Callable[[str, str], np.ndarray]:
    """Return a function from an entry of a wav.scp, and its name for messages, to (F, D)."""
    device = pick_device(args.ngpu)
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    if args.enh_config:
        from posinv.espnet.frontends import EnhSSLFrontend  # imports ESPnet, which takes seconds

        enhancement = str(args.enh_config), str(args.enh_model)
        compute = EnhSSLFrontend(args.ssl, *enhancement, layer=args.layer).encode
    else:
        compute = partial(SSLUpstream(args.ssl).to(device), layer=args.layer)

    @torch.inference_mode()
    def encode(entry: str, name: str) -> np.ndarray:
        try:
            waves = torch.from_numpy(read_audio(entry, SAMPLING_RATE))[None].to(device)
            hidden, _ = compute(waves, torch.tensor([waves.shape[1]]))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        frames = hidden.flatten(0, -2).cpu().numpy()
        if not np.isfinite(frames).all():
            raise InputError(f"{name}: the SSL model's features are not finite: train it again")
        return frames

    return encode


if __name__ == "__main__":
    run(main)
