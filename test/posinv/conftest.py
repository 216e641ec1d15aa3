import pytest
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor


@pytest.fixture
def seeded():
    """Random seed 0, and one thread: with models this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_ssl(tmp_path_factory):
    """A folder with a random HuBERT of 3 layers, 32 wide, group norm as in HuBERT-Base."""
    folder = tmp_path_factory.mktemp("tiny ssl")
    torch.manual_seed(5)
    config = HubertConfig(**{**TINY_SSL, "num_hidden_layers": 3}, feat_extract_norm="group")
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def enh_dir(tmp_path_factory):
    """A random enhancement model, as enh_train leaves it."""
    from posinv.espnet.tasks.enh import EnhancementTask  # 10 s, for the tests that use it

    directory = tmp_path_factory.mktemp("tiny enh")
    (directory / "train.yaml").write_text(
        "encoder: same\ndecoder: same\nseparator: demucs\n"
        "separator_conf: {hidden: 4, depth: 2, resample: 1}\n"
        "criterions: [{name: si_snr, conf: {}, wrapper: fixed_order, wrapper_conf: {}}]\n"
    )
    options = ["--config", str(directory / "train.yaml"), "--output_dir", str(directory)]
    EnhancementTask.main(cmd=[*options, "--dry_run", "true"])
    torch.manual_seed(1)
    model = EnhancementTask.build_model(EnhancementTask.get_parser().parse_args(options))
    torch.save(model.state_dict(), directory / "valid.loss.best.pth")
    return directory


@pytest.fixture(scope="session")
def stft_dir(enh_dir, tmp_path_factory):
    """An enhancement model of ESPnet's own, masking an STFT."""
    from posinv.espnet.tasks.enh import EnhancementTask

    directory = tmp_path_factory.mktemp("stft")
    config = yaml.safe_load((enh_dir / "config.yaml").read_text())
    config |= {
        "encoder": "stft",
        "decoder": "stft",
        "separator": "rnn",
        "separator_conf": {"num_spk": 1, "rnn_type": "lstm", "layer": 1, "unit": 8},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(2)
    model, _ = EnhancementTask.build_model_from_file(directory / "config.yaml")
    torch.save(model.state_dict(), directory / "model.pth")
    return directory
