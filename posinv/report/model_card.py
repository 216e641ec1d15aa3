"""Model cards: what a model is, where it comes from and how to load it, for its README.md."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData

from posinv.errors import InputError
from posinv.report.results import ABSENT, ERROR_RATES, aggregate, markdown_table, provenance

Kind = Literal["pretrain", "ssft", "enh"]

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TAGS = {
    "pretrain": ["self-supervised", "masked-prediction"],
    "ssft": ["self-supervised", "self-supervised-fine-tuning"],
    "enh": ["speech-enhancement", "demucs"],
}
# What of a config.yaml says how the model was made.
SETTINGS = (
    "ssl", "ssl_conf", "num_units", "separator", "separator_conf", "criterions", "model_conf",
    "init_param", "freeze_param", "optim", "optim_conf", "scheduler", "scheduler_conf",
    "max_epoch", "num_iters_per_epoch", "best_model_criterion", "accum_grad", "grad_clip",
    "batch_type", "batch_size", "batch_bins", "train_dtype", "use_amp", "ngpu", "seed",
)  # fmt: skip
VIEWS = {"speed": "speed", "semitones": "pitch", "pad": "zero-padding", "noise_scp": "noise"}
UNKNOWN = "unknown"  # the hub's name for a licence that isn't stated


def model_card(
    name: str,
    kind: Kind,
    config: Mapping,
    checkpoint: str,
    scores: Mapping[str, Mapping[str, float]] | None,
    base_license: str | None,
    command: str,
) -> str:
    """Write the card of an exported model.

    Args:
        name: its title.
        kind: the task that trained it.
        config: the training's ``config.yaml``; data lists that it names may be gone.
        checkpoint: which of the training's models this is.
        scores: error rates in percent by task (``pr``, ``asr``) and test set; None: none.
        base_license: licence of the model that training started from; None: what that model's
            own card says.
        command: what exported it.

    Returns:
        Markdown with a YAML block at its top, as the Hugging Face hub wants it.

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
    data = ModelCardData(
        **(stated[0] if all_agree else {"license": UNKNOWN}),
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
    """The models that training started from: a hub name, folders or files."""
    bases = [config["ssl"]] if kind == "ssft" else []
    # ESPnet's <file>:<source key>:<destination key>:<excluded keys>
    bases += [entry.split(":")[0] for entry in config.get("init_param") or []]
    if kind == "enh" and (checkpoint := config["separator_conf"].get("checkpoint")):
        bases.append(checkpoint)
    return bases


def _stated_licence(base: str) -> dict[str, str]:
    """The licence in the metadata of a model's card; nothing where there is none to be had."""
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


def _results(scores: Mapping[str, Mapping[str, float]]) -> str:
    sets = dict.fromkeys(name for rates in scores.values() for name in rates)
    rows = [
        [name]
        + [aggregate([scores[t][name]]) if name in scores[t] else ABSENT for t in ERROR_RATES]
        for name in sets
    ]
    return markdown_table(["test set", *ERROR_RATES.values()], rows).rstrip()


def _is_set(value: object) -> bool:
    return value not in (None, [], {})


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False).rstrip()
