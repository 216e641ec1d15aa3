import numpy as np
import pytest
import soundfile


@pytest.fixture(scope="session")
def write_utterances():
    """Write noisy and clean utterances of different lengths: wav.scp, spk1.scp and shape."""

    def write(folder, count):
        rng = np.random.default_rng(0)
        lists = {"wav.scp": "", "spk1.scp": "", "shape": ""}
        lengths = [3000 + 417 * i for i in range(count)]
        for i, length in enumerate(lengths):
            clean = 0.1 * rng.standard_normal(length)
            noisy = clean + 0.05 * rng.standard_normal(length)
            for name, wave in (("spk1", clean), ("wav", noisy)):
                soundfile.write(folder / f"{name}{i}.wav", wave, 16000)
                lists[f"{name}.scp"] += f"utt{i} {folder}/{name}{i}.wav\n"
            lists["shape"] += f"utt{i} {length}\n"
        for name, text in lists.items():
            (folder / name).write_text(text)
        return lengths

    return write
