"""Model cards, README.md: what a model is, how it was trained and how to load it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData

from posinv.errors import InputError
from posinv.report.results import ERROR_RATES, aggregate, markdown_table, provenance

Kind = Literal["pretrain", "ssft", "enh"]

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TAGS = {
    "pretrain": ["self-supervised", "masked-prediction"],
    "ssft": ["self-supervised", "self-supervised-fine-tuning"],
    "enh": ["speech-enhancement", "demucs"],
}
# The options of a config.yaml that the card quotes.
SETTINGS = (
    "ssl", "ssl_conf", "num_units", "separator", "separator_conf", "criterions", "model_conf",
    "init_param", "freeze_param", "optim", "optim_conf", "scheduler", "scheduler_conf",
    "max_epoch", "num_iters_per_epoch", "best_model_criterion", "accum_grad", "grad_clip",
    "batch_type", "batch_size", "batch_bins", "train_dtype", "use_amp", "ngpu", "seed",
)  # fmt: skip
VIEWS = {"speed": "speed", "semitones": "pitch", "pad": "zero-padding", "noise_scp": "noise"}
UNKNOWN = "unknown"  # what the Hugging Face hub calls a licence that isn't stated


def model_card(
    name: str,
    kind: Kind,
    config: Mapping,
    checkpoint: str,
    scores: Mapping[str, Mapping[str, float | None]] | None,
    base_license: str | None,
    command: str,
) -> str:
    """Return the card of an exported model.

    Args:
        name: title of the card.
        kind: the task that trained the model.
        config: the training's ``config.yaml``; the data lists in it needn't exist any more.
        checkpoint: file name of the exported checkpoint.
        scores: error rates in percent by task (``pr``, ``asr``) and test set; None: no results.
        base_license: licence of the model that training started from; None: take it from that
            model's own card.
        command: the command that exported the model.

    Returns:
        Markdown with a YAML block at the top, as the Hugging Face hub reads it.

    Raises:
        InputError: ``base_license`` for a model that was trained from scratch.
    """
    bases = _bases(kind, config)
    if base_license and not bases:
        raise InputError(
            f"--base_license {base_license}: this model was trained from scratch, it has no base "
            "model; leave the option out"
        )
    licences = {
        base: {"license": base_license} if base_license else _stated_licence(base) for base in bases
    }
    stated = [licence for licence in licences.values() if licence]
    all_agree = bool(stated) and all(licence == stated[0] for licence in licences.values())
    on_hub = kind == "ssft" and not Path(config["ssl"]).is_dir()
    licence: dict[str, Any] = stated[0] if all_agree else {"license": UNKNOWN}
    data = ModelCardData(
        **licence,
        base_model=config["ssl"] if on_hub else None,
        library_name="posinv" if kind == "enh" else "transformers",
        pipeline_tag="audio-to-audio" if kind == "enh" else "feature-extraction",
        tags=["speech", "posinv", *TAGS[kind]],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        kind=kind,
        config=config,
        checkpoint=checkpoint,
        views=_views(config),
        criteria=_trained_criteria(config),
        licences=licences,
        data_lists=_data_lists(config),
        settings=_yaml({key: config[key] for key in SETTINGS if _is_set(config.get(key))}),
        results=None if scores is None else _results(scores),
        provenance=provenance(command),
    )
    return f"{str(card).rstrip()}\n"


def _bases(kind: Kind, config: Mapping) -> list[str]:
    """Return the models that training started from: a hub name, folders or files."""
    bases = [config["ssl"]] if kind == "ssft" else []
    # An entry of ESPnet's --init_param: <file>:<source key>:<destination key>:<excluded keys>
    bases += [entry.split(":")[0] for entry in config.get("init_param") or []]
    if kind == "enh" and (checkpoint := config["separator_conf"].get("checkpoint")):
        bases.append(checkpoint)
    return bases


def _stated_licence(base: str) -> dict[str, str]:
    """Return the licence in the metadata of a model's card; empty if there is none."""
    path = Path(base)
    folder = path if path.is_dir() else path.parent
    try:
        source = folder / "README.md" if path.exists() else base
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        # No card, no such hub model, or no network.
        logging.warning("base model %s: no licence found, its card can't be read: %s", base, error)
        return {}
    if data.get("license", UNKNOWN) == UNKNOWN:
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: data.get(key) for key in keys if data.get(key)}


def _views(config: Mapping) -> list[str]:
    views = config["model_conf"].get("views") or {}
    return [name for key, name in VIEWS.items() if views.get(key)]


def _trained_criteria(config: Mapping) -> list[str]:
    return [
        criterion["name"]
        for criterion in config.get("criterions", [])
        if criterion["wrapper_conf"].get("weight", 1)
    ]


def _data_lists(config: Mapping) -> str:
    rows = []
    for part in ("train", "valid"):
        for path, name, _ in config.get(f"{part}_data_path_and_name_and_type") or []:
            lines = "not there at export"
            if Path(path).is_file():
                with Path(path).open("rb") as file:
                    lines = str(sum(1 for _ in file))
            rows.append([part, f"`{path}`", name, lines])
    return markdown_table(["for", "list", "read as", "utterances"], rows).rstrip()


def _results(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    sets = dict.fromkeys(name for rates in scores.values() for name in rates)
    rows = [[name, *(aggregate([scores[t].get(name)]) for t in ERROR_RATES)] for name in sets]
    return markdown_table(["test set", *ERROR_RATES.values()], rows).rstrip()


def _is_set(value: object) -> bool:
    return value not in (None, [], {})


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False).rstrip()
