"""Export of trained models with a model card.

An SSL model is exported as a folder for ``transformers``, a DEMUCS as a package, a checkpoint of
the ``denoiser`` package.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import yaml
from torch import nn

from posinv.data.audio import SAMPLING_RATE
from posinv.data.checkpoint import load_weights, read_checkpoint
from posinv.data.files import atomic_folder, read_yaml
from posinv.errors import InputError
from posinv.models.demucs import Demucs
from posinv.models.masked_prediction import MaskedPredictionModel
from posinv.models.ssft import SSFTModel
from posinv.report.model_card import Kind, model_card
from posinv.report.results import ERROR_RATES, read_scores

# For each task: options that only its config.yaml has, and the class that is exported. The last
# option holds the class's keyword arguments. "enh" comes before "ssft" because the enhancement
# task has "ssl" and "model_conf", too.
KINDS: dict[Kind, tuple[tuple[str, ...], type[nn.Module]]] = {
    "pretrain": (("num_units", "ssl_conf", "model_conf"), MaskedPredictionModel),
    "enh": (("separator", "separator_conf"), Demucs),
    "ssft": (("ssl", "model_conf"), SSFTModel),
}
# Options of the separator that are not options of its network.
SEPARATOR_ONLY = ("num_spk", "checkpoint")


def export(
    exp: Path,
    out: Path,
    command: str,
    checkpoint: str = "valid.loss.best.pth",
    superb: Path | None = None,
    base_license: str | None = None,
    name: str | None = None,
) -> None:
    """Write a trained model and its model card into a folder, atomically.

    A pretrained or fine-tuned SSL model gives ``config.json``, ``model.safetensors`` and
    ``preprocessor_config.json``. A DEMUCS gives ``model.th`` as denoiser writes it: its class, by
    the name ``denoiser.demucs.Demucs``, the class's arguments, and its state dict. And it gives
    ``model.yaml``, the options that :class:`~posinv.models.demucs.Demucs` loads it with. The card
    is ``README.md``.

    Args:
        exp: training directory of ``pretrain_train``, ``ssft_train`` or ``enh_train``.
        out: the folder to write; it must be new or empty.
        command: the command that exports the model, which the card quotes.
        checkpoint: file in ``exp``.
        superb: evaluation whose ``{pr,asr}/best/decode/scores.json`` the card quotes; None: none.
        base_license: licence of the model that training started from; None: take it from that
            model's own card.
        name: title of the card; None: the name of ``out``.

    Raises:
        InputError: ``exp`` is no such directory, or its checkpoint doesn't fit; an enhancement
            model that isn't a DEMUCS; ``out`` isn't empty; no such scores; ``base_license`` for a
            model that was trained from scratch.
    """
    config_file = exp / "config.yaml"
    config = read_yaml(config_file, "--exp")
    if not isinstance(config, dict):
        config = {}
    kind = next((kind for kind, (keys, _) in KINDS.items() if _has(config, keys)), None)
    if kind is None:
        raise InputError(
            f"{config_file}: not what pretrain_train, ssft_train or enh_train wrote; give --exp "
            "the directory of one of these"
        )
    if kind == "enh" and config["separator"] != "demucs":
        raise InputError(
            f"{config_file}: the separator is {config['separator']}, but only demucs has a form "
            "outside ESPnet; enhance with posinv.bin.enhance"
        )
    (*_, key), exported = KINDS[kind]
    # config.yaml may lack options that were left at their defaults.
    config[key] = _defaults(exported) | config[key]
    card = model_card(
        name=name or out.resolve().name,
        kind=kind,
        config=config,
        checkpoint=checkpoint,
        scores=None if superb is None else _read_superb(superb),
        base_license=base_license,
        command=command,
    )
    with atomic_folder(out) as fresh:
        if kind == "enh":
            _write_demucs(config["separator_conf"], exp / checkpoint, fresh)
        else:
            model = _build_ssl(kind, config)
            _load(model, exp / checkpoint)
            model.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")


def _defaults(cls: type) -> dict[str, object]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _has(config: Mapping, keys: tuple[str, ...]) -> bool:
    return all(config.get(key) is not None for key in keys)


def _build_ssl(kind: Kind, config: Mapping) -> MaskedPredictionModel | SSFTModel:
    conf = config["model_conf"]
    if kind == "pretrain":
        return MaskedPredictionModel(config["ssl_conf"], config["num_units"], **conf)
    # Only training needs the views, whose noise recordings may not exist any more.
    return SSFTModel(config["ssl"], **conf | {"views": None})


def _write_demucs(separator_conf: Mapping, checkpoint: Path, folder: Path) -> None:
    options = {name: value for name, value in separator_conf.items() if name not in SEPARATOR_ONLY}
    separator = Demucs(**options)
    _load(separator, checkpoint, prefix="separator.")
    with _denoisers_class() as demucs:
        package = {
            "class": demucs,
            "args": (),
            "kwargs": options | {"sample_rate": SAMPLING_RATE},
            "state": separator.state_dict(),
        }
        torch.save(package, folder / "model.th")
    (folder / "model.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


@contextmanager
def _denoisers_class() -> Iterator[type]:
    """Give a class that pickle writes as ``denoiser.demucs.Demucs``, without importing denoiser."""
    package, module = ModuleType("denoiser"), ModuleType("denoiser.demucs")
    stand_in = type("Demucs", (), {"__module__": module.__name__})
    module.Demucs = stand_in  # type: ignore[attr-defined]
    # pickle looks the class up where it says that it is.
    before = {name: sys.modules.get(name) for name in ("denoiser", "denoiser.demucs")}
    sys.modules |= {"denoiser": package, "denoiser.demucs": module}
    try:
        yield stand_in
    finally:
        for name, imported in before.items():
            if imported is None:
                del sys.modules[name]
            else:
                sys.modules[name] = imported


def _load(model: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a training's checkpoint, without ``prefix`` in front of its keys."""
    state = read_checkpoint(path)
    if isinstance(state, Mapping):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    load_weights(model, state, path, f"the model in {path.parent / 'config.yaml'}")


def _read_superb(directory: Path) -> dict[str, dict[str, float | None]]:
    """Return the error rates of each task and test set."""
    rates = {}
    for task in ERROR_RATES:
        scores = read_scores(directory / task / "best" / "decode" / "scores.json", None, ["rate"])
        rates[task] = {name: of_set["rate"] for name, of_set in scores.items()}
    return rates
