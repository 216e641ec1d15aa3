import pytest
import yaml

import posinv.espnet  # noqa: F401
from posinv.errors import InputError
from posinv.espnet.load import load_enhancement_model


def test_criteria_are_left_out(enh_dir, tmp_path):
    config = yaml.safe_load((enh_dir / "config.yaml").read_text())
    config["criterions"][0] |= {"name": "ssl_mse", "conf": {"ssl": "./not/here"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = load_enhancement_model(tmp_path / "config.yaml", enh_dir / "valid.loss.best.pth")
    assert not model.enh_model.training
    assert not any(p.requires_grad for p in model.enh_model.parameters())


def test_bad_models(enh_dir, stft_dir, tmp_path):
    with pytest.raises(InputError, match=r"nowhere/config\.yaml: No such file"):
        load_enhancement_model("nowhere/config.yaml", enh_dir / "valid.loss.best.pth")
    with pytest.raises(InputError, match=r"valid\.loss\.best\.pth: No such file"):
        load_enhancement_model(stft_dir / "config.yaml", stft_dir / "valid.loss.best.pth")
    with pytest.raises(InputError, match="not weights of the model"):
        load_enhancement_model(enh_dir / "config.yaml", stft_dir / "model.pth")
    with pytest.raises(InputError, match=r"not a checkpoint that|not tensors alone"):
        load_enhancement_model(enh_dir / "config.yaml", enh_dir / "config.yaml")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"not a checkpoint that|not tensors alone"):
        load_enhancement_model(enh_dir / "config.yaml", tmp_path / "empty.pth")
    config = yaml.safe_load((stft_dir / "config.yaml").read_text())
    config["separator_conf"]["num_spk"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="separates 2 speakers"):
        load_enhancement_model(tmp_path / "two.yaml", stft_dir / "model.pth")
    (tmp_path / "asr.yaml").write_text("encoder: linear\n")
    with pytest.raises(InputError, match=r"not the config\.yaml of an enhancement model"):
        load_enhancement_model(tmp_path / "asr.yaml", stft_dir / "model.pth")
