"""Measure how much position the features of an SSL model hold.

With --enhanced, also how far enhanced speech is from clean speech in these features, and how much
of the drop is left when the clean speech is shifted.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.device import pick_device
from posinv.data.files import atomic_file, write_atomic
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.report.position import position_figure, position_tables
from posinv.scoring.position import enhanced_distances, measure_position, surviving_drop
from posinv.ssl.upstream import SSLUpstream

NOISY = "noisy input"


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--ssl", required=True, help="the SSL model: hub name or folder")
    add(
        "--data",
        type=Path,
        required=True,
        help="folder with wav.scp; its clean speech, which is measured, is in spk1.scp, if there "
        "is one",
    )
    add(
        "--enhanced",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="enhanced speech of that data: folders with spk1.scp, or with enhanced/spk1.scp",
    )
    add("--baseline", default=NOISY, help="NAME from which drops are counted")
    add("--layer", type=int, default=-1, help="hidden state that enhanced speech is compared in")
    add("--silences", nargs="+", type=float, default=[0.1, 0.5], help="seconds of the shifts")
    add("--max_utterances", type=int, default=200, help="of the data, the first of them")
    add("--ngpu", type=int, default=0, help="0: CPU, 1: GPU")
    add("--out", type=Path, required=True, help="folder for position.{json,md,png}")
    args = parser.parse_args()
    device = pick_device(args.ngpu)
    noisy = read_table(args.data / "wav.scp")
    clean = noisy
    if (args.data / "spk1.scp").exists():
        clean = read_table(args.data / "spk1.scp")
    clean = dict(list(clean.items())[: args.max_utterances])
    systems = {NOISY: noisy} if args.enhanced else {}
    for entry in args.enhanced:
        name, _, folder = entry.rpartition("=")
        if (name or folder) in systems:
            raise InputError(f"--enhanced: {name or folder} is given twice: give it another NAME=")
        systems[name or folder] = _enhanced(Path(folder))
    if systems and args.baseline not in systems:
        raise InputError(f"--baseline {args.baseline}: must be one of {', '.join(systems)}")

    upstream = SSLUpstream(args.ssl).to(device)
    read = partial(read_audio, sampling_rate=SAMPLING_RATE)
    silences = sorted(args.silences)
    layers = measure_position(upstream, clean, read, silences)
    result = {
        "ssl": args.ssl,
        "data": str(args.data),
        "utterances": len(clean),
        "layer": upstream.check_layer(args.layer),
        "layers": [asdict(layer) for layer in layers],
    }
    if systems:
        distances = enhanced_distances(upstream, result["layer"], clean, systems, read, silences)
        result["distances"] = distances
        result["baseline"] = args.baseline
        result["surviving"] = surviving_drop(
            distances, args.baseline, [name for name in systems if name != args.baseline]
        )
    tables = position_tables(result)
    print(tables, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "position.json", json.dumps(result, indent=1) + "\n")
    write_atomic(args.out / "position.md", tables)
    with atomic_file(args.out / "position.png") as path:
        position_figure(result).savefig(path, dpi=150, format="png")


def _enhanced(folder: Path) -> dict[str, str]:
    for path in (folder / "spk1.scp", folder / "enhanced" / "spk1.scp"):
        if path.exists():
            return read_table(path)
    raise InputError(f"--enhanced {folder}: neither spk1.scp nor enhanced/spk1.scp in it")


if __name__ == "__main__":
    run(main)
