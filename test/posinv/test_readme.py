"""The README's Python, run as it stands; what README and its neighbours say is there is there."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from posinv.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = ["README.md", "CONTRIBUTING.md", "egs/README.md", "tools/README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert links
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    text = (ROOT / page).read_text()
    for module in re.findall(r"python3? -m posinv\.bin\.(\w+)", text):
        assert (ROOT / "posinv" / "bin" / f"{module}.py").is_file(), module
    for name in re.findall(r"[ `](tools/\w+\.(?:py|sh)|conf/[\w/]+\.yaml)", text):
        # activate_python.sh is made by set-up; conf/ may be a recipe's.
        places = [ROOT / name, *ROOT.glob(f"egs/*/*/{name}")]
        assert name == "tools/activate_python.sh" or any(map(Path.exists, places)), name


@pytest.fixture(scope="module")
def picture():
    return runpy.run_path(str(ROOT / "tools/readme_picture.py"), run_name="picture")


def test_its_table_is_that_of_the_recipe(picture):
    table = picture["error_rates"](ROOT / "egs/mini/enh1/RESULTS.md")
    assert table.startswith("Phoneme error rate (PER, %), seed")
    assert "| ssl_softdtw " in table and "Word error rate" not in table
    assert table in README.read_text(), "run python tools/readme_picture.py"


def test_the_table_is_written_between_the_marks(picture, tmp_path):
    results, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    table = "Phoneme error rate (PER, %), seed 7:\n\n| system | a |\n| - | - |\n| x | 1 |"
    results.write_text(f"# Title\n\nPER is low.\n\n{table}\n\nWord error rate (WER, %), seed 7:\n")
    marks = "<!-- posinv:results:begin -->\nold\n<!-- posinv:results:end -->"
    readme.write_text(f"# A\n\nbefore\n\n{marks}\n\nafter\n")
    picture["write_readme"](results, readme)
    text = readme.read_text()
    assert text.startswith("# A\n\nbefore\n\n<!--") and text.endswith("-->\n\nafter\n")
    assert f"\n\n{table}\n\n" in text and "old" not in text and "WER" not in text
    results.write_text("# Title\n")
    with pytest.raises(InputError, match=r"RESULTS\.md: no table of phoneme error rates"):
        picture["write_readme"](results, readme)


def test_pictures_need_a_run(picture, tmp_path, monkeypatch):
    (tmp_path / "exp").mkdir()
    monkeypatch.setattr(sys, "argv", ["readme_picture.py", "--recipe", str(tmp_path)])
    with pytest.raises(InputError, match="no fine-tuning: run the recipe to its end"):
        picture["main"]()


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
