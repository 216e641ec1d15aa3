"""Write the tables in tools/README.md's section Speed from the CSVs in tools/results."""

import csv
from pathlib import Path

from posinv.bin.cli import run
from posinv.report.results import ABSENT, markdown_table, write_results

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "naive": "LASER's authors' way",
    "authors": "LASER's authors' way",
    "floor": "only products and alignments",
}


def read(name: str) -> list[dict[str, str]]:
    """Return a CSV's rows, without its comments."""
    lines = (ROOT / "tools" / "results" / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def figure(text: str, scale: float = 1.0, digits: int = 1) -> str:
    """Return a figure of a CSV, scaled and rounded for the table."""
    value = scale * float(text)
    return f"{value:,.{0 if value >= 100 else digits}f}"


def softdtw() -> str:
    """Return the table of soft-DTW's times."""
    measured = {(row["case"], row["implementation"]): row for row in read("softdtw_cpu.csv")}
    rows = []
    for name in ("posinv", "floor", "pysdtw", "tslearn", "naive"):
        cells = [NAMES.get(name, name)]
        for case in ("loop", "cost", "features"):
            row = measured.get((case, name), {})
            for key in ("median_ms", "times_posinv"):
                cells.append(figure(row[key]) if row.get(key) else ABSENT)
        rows.append(cells)
    header = ["", "in a training, ms", "x posinv", "given the cost, at rest, ms", "x posinv"]
    header += ["divergence from features, ms", "x posinv"]
    return markdown_table(header, rows)


def ssft() -> str:
    """Return the table of the times of LASER's update."""
    keys = ("update_ms", "views_ms", "features_ms", "loss_ms", "backward_ms")
    rows = [
        [
            f"{NAMES.get(row['implementation'], row['implementation'])}, {model}-Base",
            *(figure(row[key], 1e-3, 2) for key in keys),
            figure(row["times_posinv"]),
        ]
        for model, name in (("HuBERT", "ssft_hubert_cpu.csv"), ("WavLM", "ssft_wavlm_cpu.csv"))
        for row in read(name)
    ]
    header = ["", "update, s", "views", "SSL features", "loss", "backward", "x posinv"]
    return markdown_table(header, rows)


def enh() -> str:
    """Return the table of the times of an update of SE fine-tuning."""
    keys = ("update", "enhancement", "clean", "enhanced", "loss", "backward")
    rows = [
        [
            f"{row['implementation']}, {row['criterion']}",
            *(figure(row[f"{key}_ms"], 1e-3, 2) for key in keys),
            figure(row["times_posinv"]),
        ]
        for row in read("enh_hubert_cpu.csv")
    ]
    header = ["", "update, s", "enhancement", "SSL, clean", "SSL, enhanced", "loss", "backward"]
    return markdown_table([*header, "x posinv"], rows)


def superb() -> str:
    """Return the table of the times of an update of SUPERB's heads."""
    rows = [
        [
            f"{row['phoneme_heads']} PR, {row['word_heads']} ASR",
            row["cache"],
            *(figure(row[key], digits=2) for key in ("update_s", "separate_s")),
            figure(row["times"]),
        ]
        for row in read("superb_cpu.csv")
    ]
    header = ["heads", "layers cached", "at once, s", "one by one, s", "one by one / at once"]
    return markdown_table(header, rows)


def main() -> None:
    """Run the command."""
    body = (
        "Time for the value and gradient of soft-DTW: a batch of 8 pairs with 600 and 560 frames,"
        " features of dimension 256 ([softdtw_cpu.csv](results/softdtw_cpu.csv) names machine and"
        ' versions). "In a training" is measured right after torch has computed the cost, while'
        ' torch\'s threads are still active; "at rest" is measured after they have stopped:\n\n'
        f"{softdtw()}\n![Time over batch and over length](results/softdtw_cpu.png)\n\n"
        "Training time per update for LASER; the batch is one utterance of 12 s and its perturbed"
        " copy; float32_matmul_precision is medium"
        " ([ssft_hubert_cpu.csv](results/ssft_hubert_cpu.csv),"
        f" [ssft_wavlm_cpu.csv](results/ssft_wavlm_cpu.csv)):\n\n{ssft()}\n"
        "Training time per update for SE fine-tuning; the enhancement model is master64, the frozen"
        " SSL model HuBERT-Base, the batch one utterance of 12 s"
        f" ([enh_hubert_cpu.csv](results/enh_hubert_cpu.csv)):\n\n{enh()}\n"
        "Training time per update for SUPERB's heads on HuBERT-Base features; an update has two"
        " batches, each of 16 utterances of 2 s"
        f" ([superb_cpu.csv](results/superb_cpu.csv)):\n\n{superb()}"
    )
    write_results(ROOT / "tools" / "README.md", "Tools", body)


if __name__ == "__main__":
    run(main)
