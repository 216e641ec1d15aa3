"""The README's Python, run as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_python_examples(tiny_ssl, enh_dir):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 3
    torch.manual_seed(0)
    played = []
    names = {
        "model": torch.nn.Linear(4, 3),
        "batches": [
            (torch.randn(2, 9, 4), torch.randn(2, 7, 4), torch.tensor([9, 5]), torch.tensor([6, 7]))
        ],
        "noisy": 0.1 * torch.randn(5000, 2).numpy(),
        "microphone": 0.1 * torch.randn(6, 1000).numpy(),
        "play": lambda chunk: played.append(len(chunk)),
        "waves": torch.randn(2, 4000),
        "lengths": torch.tensor([4000, 3000]),
    }
    for example in examples:
        example = example.replace("facebook/hubert-base-ls960", tiny_ssl)
        exec(example.replace("exp/seed1/ssl_softdtw", str(enh_dir)), names)
    assert names["model"].weight.grad.abs().sum() > 0
    assert names["hidden"].shape == (4, 2, 12, 32)
    assert names["frames"].tolist() == [12, 9]
    assert names["clean"].shape == (5000, 2)
    assert sum(played) == 6000 and len(played) == 7
