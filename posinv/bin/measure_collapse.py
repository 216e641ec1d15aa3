"""Measure how far an SSL model's last layer has collapsed: frame distance and effective rank."""

import json
from pathlib import Path
from statistics import fmean

import torch

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.device import pick_device
from posinv.data.files import write_atomic
from posinv.data.tables import read_table
from posinv.losses.functional import effective_rank, frame_distance
from posinv.ssl.upstream import SSLUpstream


@torch.inference_mode()
def main() -> None:
    """Measure each utterance, see ``posinv.losses.functional``, and write the means as JSON."""
    parser = command_parser(__doc__)
    parser.add_argument("--ssl", required=True, help="the SSL model: hub name or folder")
    parser.add_argument("--wav_scp", type=Path, required=True, help="utterances, 16 kHz")
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU, 1: GPU")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    device = pick_device(args.ngpu)
    upstream = SSLUpstream(args.ssl).to(device)
    measures: dict[str, list[float]] = {"frame_distance": [], "effective_rank": []}
    for entry in read_table(args.wav_scp).values():
        wave = torch.from_numpy(read_audio(entry, SAMPLING_RATE)).to(device)
        hidden, frames = upstream(wave[None], [len(wave)], layer=-1)
        measures["frame_distance"].append(frame_distance(hidden, frames).item())
        measures["effective_rank"].append(effective_rank(hidden, frames).item())
    write_atomic(
        args.out, json.dumps({name: fmean(values) for name, values in measures.items()}) + "\n"
    )


if __name__ == "__main__":
    run(main)
