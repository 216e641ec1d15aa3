"""The README's Python, run as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_python_examples(tiny_ssl):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 2
    torch.manual_seed(0)
    names = {
        "x": torch.randn(2, 9, 4, requires_grad=True),
        "y": torch.randn(2, 7, 4),
        "x_lengths": torch.tensor([9, 5]),
        "y_lengths": torch.tensor([6, 7]),
        "waves": torch.randn(2, 4000),
        "lengths": torch.tensor([4000, 3000]),
    }
    for example in examples:
        exec(example.replace("facebook/hubert-base-ls960", tiny_ssl), names)
    assert names["x"].grad.abs().sum() > 0
    assert names["hidden"].shape == (4, 2, 12, 32)
    assert names["frames"].tolist() == [12, 9]
