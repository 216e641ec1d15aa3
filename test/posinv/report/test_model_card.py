import pytest
import yaml

from posinv.errors import InputError
from posinv.report.model_card import model_card
from posinv.report.results import ABSENT, ERROR_RATES

CONFIGS = {
    "pretrain": {
        "num_units": 50,
        "ssl_conf": {"hidden_size": 16},
        "model_conf": {"normalize": True},
        "seed": 3,
        "version": "202511",
    },
    "ssft": {
        "ssl": "someone/base",
        "model_conf": {
            "layer": -1, "trainable_layers": 2, "loss": "soft_dtw", "gamma": 0.1, "alpha": 0.4,
            "margin": 1.1, "window": 0,
            "views": {"speed": [0.9], "semitones": [2], "pad": None, "noise_scp": "x", "snrs": [5]},
        },
    },
    "enh": {
        "separator": "demucs",
        "separator_conf": {"hidden": 4, "depth": 2, "causal": True, "checkpoint": None},
        "model_conf": {},
        "criterions": [
            {"name": "ssl_mse_pad", "conf": {"ssl": "x"}, "wrapper_conf": {"weight": 1.0}},
            {"name": "l1_td", "conf": {}, "wrapper_conf": {}},
            {"name": "si_snr", "conf": {}, "wrapper_conf": {"weight": 0.0}},
        ],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """No network, and an empty cache of hub models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def card_of(kind, base_license=None, scores=None, **changes):
    config = {**CONFIGS[kind], **changes}
    return model_card("A name", kind, config, "3epoch.pth", scores, base_license, "the command")


def metadata(card):
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def section(card, title):
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def cells(text):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


NOT_STATED = "not stated by the base model; check before you share"


@pytest.mark.parametrize("kind", CONFIGS)
def test_has_every_section_and_no_ragged_space(kind):
    card = card_of(kind)
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "Base model and licence", "Training data", "Settings", "Results", "How to load it",
        "Provenance",
    ]  # fmt: skip
    assert "\n# A name\n" in card
    assert "\n\n\n" not in card and card.endswith("\n") and not card.endswith("\n\n")
    assert "None were given" in section(card, "Results")
    assert "`the command`" in section(card, "Provenance")
    assert "git commit" in section(card, "Provenance")
    data = metadata(card)
    assert data["license"] == "unknown" and "posinv" in data["tags"]
    assert data["library_name"] == ("posinv" if kind == "enh" else "transformers")


def test_what_it_is():
    assert "50 k-means units" in card_of("pretrain")
    laser = card_of("ssft")
    assert (
        "(speed, pitch, noise)" in laser
        and "soft-DTW divergence (\N{GREEK SMALL LETTER GAMMA} = 0.1)" in laser
    )
    assert "= 0.4, margin 1.1, window 0)" in laser
    conf = {**CONFIGS["ssft"]["model_conf"], "loss": "mse", "alpha": 0.0, "views": None}
    mse = card_of("ssft", model_conf=conf)
    assert "(no perturbation)" in mse and "without a regulariser" in mse
    assert "mean squared error frame by frame" in mse and "soft-DTW" not in mse
    enh = card_of("enh")
    assert "causal, trained" in enh and "criteria: ssl_mse_pad, l1_td." in enh
    assert "2601.21084" in enh
    assert "2601.21084" not in card_of("enh", criterions=CONFIGS["enh"]["criterions"][1:])


def test_settings_are_what_the_config_says():
    settings = section(card_of("pretrain", optim="adamw", init_param=[]), "Settings")
    assert "`3epoch.pth`" in settings
    assert yaml.safe_load(settings.split("```yaml\n")[1].split("```")[0]) == {
        "num_units": 50, "ssl_conf": {"hidden_size": 16}, "model_conf": {"normalize": True},
        "optim": "adamw", "seed": 3,
    }  # fmt: skip


def test_training_data_is_counted_or_said_to_be_gone(tmp_path):
    (tmp_path / "wav.scp").write_text("a x\nb y\n")
    lists = {
        "train_data_path_and_name_and_type": [[str(tmp_path / "wav.scp"), "speech", "sound"]],
        "valid_data_path_and_name_and_type": [["dump/gone.scp", "speech", "sound"]],
    }
    rows = cells(section(card_of("pretrain", **lists), "Training data"))
    assert ["train", f"`{tmp_path}/wav.scp`", "speech", "2"] in rows
    assert ["valid", "`dump/gone.scp`", "speech", "not there at export"] in rows


class TestLicence:
    def test_no_base(self):
        assert "there is no base model" in section(card_of("pretrain"), "Base model and licence")
        with pytest.raises(InputError, match=r"--base_license mit: .* no base model"):
            card_of("pretrain", "mit")

    def test_given(self):
        card = card_of("ssft", "cc-by-4.0")
        assert metadata(card)["license"] == "cc-by-4.0"
        assert metadata(card)["base_model"] == "someone/base"
        assert "`someone/base`. Its licence: cc-by-4.0." in card

    def test_hub_model_that_is_not_cached(self):
        card = card_of("ssft")
        assert metadata(card)["base_model"] == "someone/base"
        assert f"`someone/base`. Its licence: {NOT_STATED}." in card

    def test_hub_model_whose_card_is_cached(self, hub_cache):
        folder = hub_cache / "models--someone--base"
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
        card = card_of("ssft")
        assert metadata(card)["license"] == "mit" and "Its licence: mit." in card

    @pytest.mark.parametrize(
        "text", [None, "# No metadata\n", "---\nlicense: unknown\n---\n", "---\na: [\n---\n"]
    )
    def test_folder_that_does_not_state_one(self, tmp_path, text):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        card = card_of("ssft", ssl=str(tmp_path))
        assert metadata(card)["license"] == "unknown" and "base_model" not in metadata(card)
        assert f"`{tmp_path}`. Its licence: {NOT_STATED}." in card

    def test_folder_with_a_licence_of_its_own(self, tmp_path):
        head = {"license": "other", "license_name": "x-1.0", "license_link": "https://x.org"}
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
        card = card_of("ssft", ssl=str(tmp_path))
        assert head.items() <= metadata(card).items()
        assert "Its licence: x-1.0 (https://x.org)." in card

    def test_enhancer(self, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        (tmp_path / "best.pth").touch()
        card = card_of("enh", init_param=[f"{tmp_path}/best.pth:a:b"])
        assert f"`{tmp_path}/best.pth`. Its licence: mit." in card and "CC BY-NC" in card
        assert metadata(card)["license"] == "mit" and "base_model" not in metadata(card)
        released = {**CONFIGS["enh"]["separator_conf"], "checkpoint": "gone/dns48.th"}
        card = card_of("enh", separator_conf=released)
        assert f"`gone/dns48.th`. Its licence: {NOT_STATED}." in card

    def test_bases_that_differ(self, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        card = card_of("ssft", ssl=str(tmp_path), init_param=["gone.pth"])
        assert metadata(card)["license"] == "unknown"
        assert "Its licence: mit." in card and NOT_STATED in card


def test_results():
    scores = {"pr": {"clean": 5.0, "noisy": 12.34}, "asr": {"clean": 7.0}}
    results = section(card_of("ssft", scores=scores), "Results")
    header, _, *rows = cells(results)
    assert header == ["test set", *ERROR_RATES.values()]
    assert rows == [["clean", "5.0", "7.0"], ["noisy", "12.3", ABSENT]]
    assert "None were given" not in results
