"""The report of an experiment: one HTML file with tables, curves, audio, alignments, settings."""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
import soundfile
import torch
from markupsafe import Markup
from torch import Tensor

from posinv.augment.speed import resample
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.checkpoint import read_checkpoint
from posinv.data.files import write_atomic
from posinv.data.tables import read_table, read_tsv
from posinv.errors import InputError
from posinv.report import pictures
from posinv.report.convergence import (
    LOGARITHMIC,
    Curves,
    config_of,
    epochs_of,
    fine_tuning_panels,
    head_panels,
)
from posinv.report.experiment import Experiment, Utterance
from posinv.report.results import ERROR_RATES, METRICS, NONE_PUBLISHED, SHORT, Published
from posinv.report.significance import Difference
from posinv.report.summary import summarise
from posinv.report.tables import Cell, Column, Table
from posinv.scoring.text import aligned_tokens
from posinv.ssl.upstream import SSLUpstream

HERE = Path(__file__).parent
MAX_AUDIO = 7_000_000  # bytes of all players; base64 makes them a third larger
MAX_SECONDS = 10.0  # of an utterance that is chosen here
SPEED = Fraction(11, 10)  # of the clean speech in the alignments
# Options that differ in every training, or that say where it was, not what it was.
PLACES = ("output_dir", "config", "log_level", "dist_", "local_rank", "ngpu", "num_workers")
Layers = list[dict[str, Any]]


@dataclass
class Voice:
    """A row of an utterance: who speaks, what was heard."""

    label: str
    scores: str
    image: str = ""
    audio: str = ""
    transcripts: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)


@dataclass
class Heard:
    """An utterance in all systems."""

    name: str
    about: str
    voices: list[Voice]


def write_report(
    experiment: Experiment,
    out: Path | str,
    title: str,
    provenance: str,
    published: Published = NONE_PUBLISHED,
    utterances: Sequence[str] = (),
) -> None:
    """Write the report of an experiment, one HTML file that needs no network.

    What is not there is left out, and the report says so.

    Args:
        experiment: the experiment, complete or not.
        out: the file, written atomically.
        title: its heading.
        provenance: how the results were made, a Markdown list, see
            :func:`~posinv.report.results.provenance`.
        published: published figures, for columns beside ours.
        utterances: ids of the test utterances to listen to; none: one of each test set, up to
            three, of a middle length.

    Raises:
        InputError: an utterance that is not in the test sets; damaged scores.
    """
    summary = summarise(experiment, published)
    missing = list(summary.missing)
    if not experiment.systems:
        missing.append("there is no system yet: no training and no score of any is there")
    elif not experiment.sets:
        missing.append("no test set has been decoded and scored yet")
    elif not summary.found and len(experiment.systems) > 1:
        missing.append("no differences: scores.tsv of two systems are not there; score again")
    heard = _listen(experiment, utterances, missing)
    alignments, about_alignments = _alignments(experiment, heard, missing)
    times = _times(experiment)
    parts: dict[str, Any] = {
        "tables": summary.tables,
        "found": _by_task(summary.found),
        "convergence": _convergence(experiment),
        "utterances": heard,
        "alignments": alignments,
        "layers": _layers(experiment),
        "settings": _settings(experiment),
        "times": times,
        "provenance": [line.removeprefix("- ") for line in provenance.splitlines()],
    }
    names = {
        "tables": ("results", "Results"),
        "found": ("differences", "Differences"),
        "convergence": ("convergence", "Convergence"),
        "utterances": ("listen", "Listen"),
        "alignments": ("alignment", "Alignment"),
        "layers": ("layers", "Layers"),
        "settings": ("settings", "Settings"),
        "times": ("time", "Time"),
        "provenance": ("origin", "Origin"),
    }
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(
        parts,
        title=title,
        facts=_facts(experiment),
        sections=[name for key, name in names.items() if parts[key]],
        missing=missing,
        alignment_text=about_alignments,
        commands=_commands(experiment),
        folder=str(experiment.path.resolve()),
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        place=lambda value, widest: f"{50 + 48 * value / widest:.2f}",
        marked=lambda table: any(cell.marks for row in table.rows for cell in row),
    )
    write_atomic(out, page)


def _facts(experiment: Experiment) -> str:
    seeds = f"random seed{'s' * (len(experiment.seeds) > 1)} {', '.join(experiment.seeds)}"
    facts = [
        f"{len(experiment.systems)} systems" if experiment.systems else "no system",
        seeds if experiment.seeds else "no random seed",
        f"{len(experiment.sets)} test sets" if experiment.sets else "no scores",
    ]
    return " \N{MIDDLE DOT} ".join(facts)


def _by_task(found: Sequence[Difference]) -> list[tuple[str, list[Difference], float]]:
    """Return the comparisons of each task, with its title and its widest interval's end."""
    titles = ERROR_RATES | {metric: name for metric, (name, _) in METRICS.items()}
    groups = {title: [one for one in found if one.task == t] for t, title in titles.items()}
    return [
        (title, ones, np.nanmax([1e-9, *(abs(end) for one in ones for end in (one.low, one.high))]))
        for title, ones in groups.items()
        if ones
    ]


# ------------------------------------------------------------------------------- convergence
def _convergence(experiment: Experiment) -> list[tuple[Markup, str]]:
    drawings = []
    if panels := fine_tuning_panels(experiment):
        text = (
            "Fine-tuning: statistics of the validation set after each epoch, one line for each "
            "random seed. A loss is compared with its own first value, since the losses of "
            "different criteria have different units. Minutes are those of training and "
            "validation."
        )
        drawings.append((_drawing(panels, "fine"), text))
    for task, title in (("pr", "PR head"), ("asr", "ASR head")):
        if panels := head_panels(experiment, task):
            text = f"{title}: token error rate of the validation set while the head learns."
            drawings.append((_drawing(panels, task), text))
    return drawings


def _drawing(panels: Mapping[str, Curves], name: str) -> Markup:
    figure = pictures.convergence_figure(panels, LOGARITHMIC)
    return Markup(pictures.svg(figure, f"curves-{name}"))


# ------------------------------------------------------------------------------------ listen
def _listen(experiment: Experiment, chosen: Sequence[str], missing: list[str]) -> list[Heard]:
    data = experiment.test_data
    if data is None or not experiment.seeds:
        if experiment.sets:
            missing.append("nothing to listen to: the formatted test sets are not there any more")
        if chosen:
            raise InputError(f"--utterances {chosen[0]}: the formatted test sets are not there")
        return []
    seed = experiment.seeds[0]
    noisy, clean = (
        read_table(data / name) if (data / name).is_file() else {}
        for name in ("wav.scp", "spk1.scp")
    )
    sets = read_table(data / "utt2set")
    for utterance in chosen:
        if utterance not in sets:
            raise InputError(f"--utterances {utterance}: not in {data}/utt2set: correct its id")
    enhanced = {
        system: read_table(path)
        for system in experiment.systems
        if (path := experiment.enhanced(seed, system).with_name("spk1.scp")).is_file()
    }
    heard: list[Heard] = []
    size = 0
    for utterance in chosen or _middle(experiment, data, sets):
        first = [("clean", clean)] if clean else []
        audio: list[tuple[str, Mapping[str, str]]] = [*first]
        if experiment.tunes_enhancement:
            for system in experiment.systems:
                audio.append((system, noisy if system == "noisy" else enhanced.get(system, {})))
        else:
            audio = [("speech", noisy), *((system, {}) for system in experiment.systems)]
        level, voices = None, []
        for system, table in audio:
            wave = _wave(experiment, table.get(utterance))
            voice = _voice(experiment, seed, system, utterance, sets[utterance])
            if wave is not None:
                level = float(pictures.spectrum(wave).max()) if level is None else level
                voice.image = _inlined(pictures.png(pictures.spectrogram(wave, level)), "image/png")
                coded = _flac(wave)
                size += len(coded)
                voice.audio = _inlined(coded, "audio/flac")
            if wave is not None or voice.transcripts:
                voices.append(voice)
        if size > MAX_AUDIO and heard:
            missing.append(
                f"utterance {utterance} and those after it: they would make this file too large; "
                "--utterances chooses others"
            )
            break
        about = f"{sets[utterance]}, random seed {seed}"
        heard.append(Heard(utterance, about, voices))
    return heard


def _middle(experiment: Experiment, data: Path, sets: Mapping[str, str]) -> list[str]:
    """Return an utterance of middle length of each of the first three test sets, noisy first."""
    lengths = {
        utterance: int(samples) / SAMPLING_RATE
        for utterance, samples in read_table(data / "utt2num_samples").items()
    }
    names = experiment.enh_sets if experiment.tunes_enhancement else []
    names = [*dict.fromkeys([*names, *experiment.sets])][:3] or [*dict.fromkeys(sets.values())][:1]
    chosen = []
    for name in names:
        of_set = sorted(u for u, set_of in sets.items() if set_of == name)
        short = [u for u in of_set if lengths[u] <= MAX_SECONDS] or [
            min(of_set, key=lambda u: lengths[u])
        ]
        middle = sorted(short, key=lambda u: (lengths[u], u))[len(short) // 2]
        chosen.append(middle)
    return chosen


def _wave(experiment: Experiment, entry: str | None) -> np.ndarray | None:
    path = experiment.find(entry) if entry else None
    if path is None or not path.is_file():
        return None
    return read_audio(str(path), SAMPLING_RATE)


def _voice(experiment: Experiment, seed: str, system: str, utterance: str, name: str) -> Voice:
    label = experiment.labels.get(system, f"{system} speech" if system == "clean" else system)
    voice = Voice(label, "")
    scores = []
    measured = experiment.measures(seed, system).get(name, {}).get(utterance, {})
    for metric, value in measured.items():
        title, decimals = METRICS[metric]
        scores.append(f"{title} {value:.{decimals}f}")
    for task, rate in SHORT.items():
        if task not in ERROR_RATES or system not in experiment.systems:
            continue
        found = _found(experiment.utterances(seed, system, task).get(name, ()), utterance)
        if found is not None:
            title = {"pr": "phonemes", "asr": "words"}[task]
            voice.transcripts.append((title, aligned_tokens(found.ref, found.hyp)))
            if found.ref_tokens:
                scores.append(f"{rate} {100 * found.errors / found.ref_tokens:.0f} %")
    voice.transcripts.reverse()  # words first
    voice.scores = " \N{MIDDLE DOT} ".join(scores)
    return voice


def _found(scored: Iterable[Utterance], name: str) -> Utterance | None:
    return next((utterance for utterance in scored if utterance.name == name), None)


def _flac(wave: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.clip(wave, -1, 1), SAMPLING_RATE, "PCM_16", format="FLAC")
    return out.getvalue()


def _inlined(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --------------------------------------------------------------------------------- alignment
def _alignments(
    experiment: Experiment, heard: Sequence[Heard], missing: list[str]
) -> tuple[list[tuple[str, Markup]], str]:
    """Return the drawings of an utterance's alignments in each system, and what they show."""
    if not heard:
        return [], ""
    utterance, seed = heard[0].name, experiment.seeds[0]
    data = cast(Path, experiment.test_data)
    drawings: list[tuple[str, Markup]] = []
    speech = "clean" if experiment.tunes_enhancement else "test"
    try:
        table = read_table(data / ("spk1.scp" if experiment.tunes_enhancement else "wav.scp"))
        clean = _wave(experiment, table.get(utterance))
        if clean is None:
            raise InputError("its audio is not there any more")
        fast = resample(torch.from_numpy(clean)[None], SPEED)[0].float()
        for system in experiment.systems:
            features = _features_of(experiment, seed, system, utterance, clean)
            if features is None:
                continue
            encode, wave, seconds, gamma = features
            alignment = pictures.align_features(encode(wave), encode(fast), gamma)
            rows = "enhanced" if experiment.tunes_enhancement else "speech"
            rows = "noisy" if system == "noisy" else rows
            columns = f"{speech} speech, {float(SPEED)} times as fast"
            figure = pictures.alignment_figure(alignment, seconds, rows, columns, pictures.INK)
            cost = alignment.distance[tuple(alignment.path.T)].mean()
            name = f"{experiment.labels[system]}: mean distance on the path {cost:.2f}"
            number = len(drawings)
            drawings.append((name, Markup(pictures.svg(figure, f"alignment-{number}"))))
    except (InputError, OSError) as error:
        missing.append(f"no alignment of {utterance}: {error}")
    text = (
        f"Utterance {utterance}: the last layer's features of the SSL model, L2-normalised, "
        f"against those of the {speech} speech played {float(SPEED)} times as fast. Left: squared "
        "Euclidean distance of the frames, dark is near. Right: the expected alignment of "
        "soft-DTW, bright is certain. The line is the path of DTW."
    )
    return drawings, text


def _features_of(
    experiment: Experiment, seed: str, system: str, utterance: str, clean: np.ndarray
) -> tuple[Any, Tensor, float, float] | None:
    """Return an encoder, the wave to encode, the seconds of a frame, and gamma; or None."""
    training = experiment.training(seed, system)
    config = config_of(training) if training is not None else {}
    if experiment.tunes_enhancement:
        model = _ssl_of(experiment, seed)
        scp = experiment.enhanced(seed, system).with_name("spk1.scp")
        if system == "noisy":
            scp = cast(Path, experiment.test_data) / "wav.scp"
        if not scp.is_file():
            return None
        wave = _wave(experiment, read_table(scp).get(utterance))
        confs = [entry.get("conf") or {} for entry in config.get("criterions") or []]
        gamma = next((conf["gamma"] for conf in confs if "gamma" in conf), 0.1)
    else:
        wave = clean
        tuned = experiment.folder(seed, system) / "model"
        model = str(tuned) if tuned.is_dir() else _ssl_of(experiment, seed)
        gamma = config.get("model_conf", {}).get("gamma", 0.1)
    if wave is None or model is None:
        return None
    upstream = _upstream(model)

    @torch.inference_mode()
    def encode(samples: Tensor) -> Tensor:
        hidden, frames = upstream(samples[None], [samples.numel()], layer=-1)
        return hidden[0, : int(frames[0])]

    seconds = pictures.frame_seconds(upstream.hop)
    return encode, torch.from_numpy(wave), seconds, gamma


@cache
def _upstream(name: str) -> SSLUpstream:
    return SSLUpstream(name)


def _ssl_of(experiment: Experiment, seed: str) -> str | None:
    """Return the SSL model of the first training that names one, or the one pretrained here."""
    for system in experiment.systems:
        training = experiment.training(seed, system)
        config = config_of(training) if training is not None else {}
        confs = [entry.get("conf") or {} for entry in config.get("criterions") or []]
        for name in (config.get("ssl"), *(conf.get("ssl") for conf in confs)):
            if name:
                return str(experiment.find(name) or name)
    pretrained = experiment.path / "ssl" / "model"
    return str(pretrained) if pretrained.is_dir() else None


# ------------------------------------------------------------------------- layers, settings
def _layers(experiment: Experiment) -> Layers:
    tables = []
    for task in ERROR_RATES:
        rows = []
        for seed in experiment.seeds[:1]:
            for system in experiment.systems:
                path = experiment.head(seed, system, task) / "valid.cer_ctc.best.pth"
                if not path.is_file():
                    continue
                state = cast(dict[str, Tensor], read_checkpoint(path, mmap=True))
                if (weights := state.get("frontend.weights")) is not None:
                    rows.append((experiment.labels[system], weights.softmax(0).tolist()))
        if rows:
            names = ["layer", *map(str, range(max(len(weights) for _, weights in rows)))]
            title = f"Head for {SHORT[task]}, random seed {experiment.seeds[0]}"
            tables.append({"title": title, "names": names, "rows": rows})
    return tables


def _flat(value: object, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        pairs = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        pairs = [(f"{key}.{number}", item) for number, item in enumerate(value)]
    else:
        return {key: value if isinstance(value, str) else json.dumps(value)}
    return {name: text for pair in pairs for name, text in _flat(pair[1], pair[0]).items()}


def _settings(experiment: Experiment) -> dict[str, Any]:
    flat = {}
    for system in experiment.systems:
        for seed in experiment.seeds[:1]:
            if (training := experiment.training(seed, system)) is not None:
                flat[experiment.labels[system]] = _flat(config_of(training))
    keys = dict.fromkeys(key for options in flat.values() for key in options)
    rows = []
    for key in keys:
        values = [options.get(key, "") for options in flat.values()]
        if len(set(values)) > 1 and not key.startswith(PLACES):
            rows.append((key, values))
    return {"names": ["option", *flat], "rows": rows} if rows else {}


# ------------------------------------------------------------------------------- time, origin
def _times(experiment: Experiment) -> list[Table]:
    tables = []
    path = experiment.path / "stages.tsv"
    if path.is_file():
        rows = [
            [
                Cell(f"{row['stage']} {row['title']}"),
                Cell(_duration(float(row["seconds"])), float(row["seconds"])),
                Cell(row["ended"]),
                Cell(row["command"]),
            ]
            for row in read_tsv(path, ("stage", "title", "seconds", "ended", "command"))
        ]
        columns = [Column(name) for name in ("stage", "time", "ended (UTC)", "command")]
        tables.append(Table("Stages", "Stages, in the order in which they ended", columns, rows))
    rows = []
    for seed in experiment.seeds:
        for system in experiment.systems:
            training = experiment.training(seed, system)
            places = [(experiment.labels[system], training)] if training else []
            places += [
                (f"{experiment.labels[system]}: {SHORT[task]} head", head)
                for task in ERROR_RATES
                if (head := experiment.head(seed, system, task)).is_dir()
            ]
            for label, directory in places:
                epochs = epochs_of(directory)
                seconds = sum(epoch[phase]["time"] for epoch in epochs for phase in epoch)
                if epochs:
                    cells = Cell(_duration(seconds), seconds), Cell(str(len(epochs)), len(epochs))
                    rows.append([Cell(label), Cell(seed, float(seed)), *cells])
    if rows:
        columns = [Column(name) for name in ("training", "seed", "time", "epochs")]
        tables.append(Table("Trainings", "Trainings, with their validation", columns, rows))
    return tables


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _commands(experiment: Experiment) -> list[tuple[str, str]]:
    records = sorted(experiment.path.glob("**/run.sh"))
    return [
        (str(path.parent.relative_to(experiment.path)), path.read_text(encoding="utf-8"))
        for path in records
    ]
