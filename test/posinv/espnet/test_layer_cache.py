"""The file of layers: what is read back, kills, room, and trainings at the same time."""

import shutil
import threading
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.errors import InputError
from posinv.espnet import layer_cache
from posinv.espnet.layer_cache import FileCache, MemoryCache, content_key

LAYERS, SIZE = 3, 4


def utterance(seed, frames=5):
    return torch.randn(LAYERS, frames, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path):
    """A function that opens the cache anew, as the next process would."""
    opened = []

    def make(part=0):
        opened.append(FileCache(tmp_path / "cache", LAYERS, SIZE, part))
        return opened[-1]

    yield make
    for one in opened:
        one._lock.release(force=True)


def kill(cache):
    """Leave the files as SIGKILL would."""
    cache._data.close()
    cache._lock.release(force=True)
    cache._index.detach()  # nothing of it is written


def test_same_samples_have_the_same_key():
    wave = torch.randn(1000)
    assert (
        content_key(wave) == content_key(wave.clone()) == content_key(torch.cat([wave] * 2)[:1000])
    )
    assert content_key(wave) != content_key(wave[:-1])
    assert content_key(wave) != content_key(wave * (1 + 1e-6))


def test_layers_come_back_in_float16(cache, monkeypatch):
    monkeypatch.setattr(layer_cache, "SAVE_EVERY", 2)
    first = cache()
    lengths = [5, 1, 9, 2, 3]
    put = [first.put(f"{i}", utterance(i, n)) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        assert torch.equal(put[i], utterance(i, n).half())
    assert torch.equal(first.get("4"), put[4])  # not saved yet
    assert first.get("5") is None
    first.close()
    second = cache()
    assert len(second) == 5
    assert all(torch.equal(second.get(f"{i}"), layers) for i, layers in enumerate(put))
    second.put("5", utterance(5))
    assert torch.equal(second.get("5"), utterance(5).half())
    assert torch.equal(second.get("0"), put[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_killed_process_leaves_whole_utterances(tmp_path_factory, data):
    """Killed at any time: what the index names is read back, and the rest is put again."""
    folder = tmp_path_factory.mktemp("cache")
    before = FileCache(folder, LAYERS, SIZE)
    saved, unsaved = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    for i in range(saved):
        before.put(f"{i}", utterance(i, i + 1))
    before.save()
    for i in range(saved, saved + unsaved):
        before.put(f"{i}", utterance(i, i + 1))
    kill(before)
    with (folder / "layers.0").open("ab") as file:  # part of the next utterance
        file.write(b"x" * data.draw(st.integers(0, 50)))
    line = f"{saved} {(folder / 'layers.0').stat().st_size // 2} 3\n"
    with (folder / "index.0").open("a") as file:  # part of its line
        file.write(line[: data.draw(st.integers(0, len(line) - 1))])
    after = FileCache(folder, LAYERS, SIZE)
    assert len(after) == saved
    for _ in range(2):
        for i in range(saved + unsaved + 1):
            layers = after.get(f"{i}")
            if layers is None:
                layers = after.put(f"{i}", utterance(i, i + 1))
            assert torch.equal(layers, utterance(i, i + 1).half())
    assert len(after) == saved + unsaved + 1
    after.close()


def test_processes_read_each_others_parts(cache):
    first, second = cache(0), cache(1)
    first.put("a", utterance(1))
    second.put("b", utterance(2))
    first.close()
    second.close()
    alone = cache(0)
    assert torch.equal(alone.get("a"), utterance(1).half())
    assert torch.equal(alone.get("b"), utterance(2).half())


def test_another_training_waits(cache):
    first = cache()
    opened = threading.Event()
    waiting = threading.Thread(target=lambda: (cache(), opened.set()), daemon=True)
    waiting.start()
    assert not opened.wait(0.3)
    first.put("a", utterance(1))
    first.close()
    assert opened.wait(10)


def test_refused_without_room(cache, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9))
    frames = [10**9 // (2 * LAYERS * SIZE)]
    full = cache()
    full.require_room(frames)
    with pytest.raises(InputError, match=r"take 2.0 GB, of which 0.0 GB are there; .* 1.0 GB free"):
        full.require_room(frames * 2)
    full.put("a", utterance(1))
    full.require_room([frames[0] + 5])


def test_what_float16_cannot_hold_is_refused(cache):
    with pytest.raises(InputError, match="values up to 70000, beyond float16's 65504"):
        cache().put("a", torch.full((LAYERS, 1, SIZE), 7e4))


@pytest.mark.parametrize("line", ["a 0", "a 0 x", "a 0 100"])
def test_a_file_that_is_none_is_refused(cache, tmp_path, line):
    cache().close()
    (tmp_path / "cache/index.0").write_text(f"{line}\n")
    with pytest.raises(InputError, match="remove"):
        cache()


def test_memory_keeps_to_its_room():
    memory = MemoryCache(room=2 * utterance(0).nbytes)
    for i in range(3):
        assert torch.equal(memory.put(f"{i}", utterance(i)), utterance(i))
    assert torch.equal(memory.get("1"), utterance(1)) and memory.get("2") is None
