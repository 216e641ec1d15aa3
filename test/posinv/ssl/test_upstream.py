import copy
import pickle

import pytest
import torch

from posinv.errors import InputError
from posinv.ssl.upstream import Frozen, SSLUpstream

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_frozen_model_stays_in_eval_mode(folders):
    ssl = SSLUpstream(folders / "hubert-base")
    assert not any(p.requires_grad for p in ssl.parameters())
    assert not ssl.train().model.training
    assert SSLUpstream(folders / "hubert-base", trainable=["*"]).train().model.training


def test_a_frozen_model_builds_no_graph_but_passes_a_gradient_on(folders, batch, family):
    ssl = SSLUpstream(folders / family)
    waves, lengths = batch([4000, 5000])
    hidden, _ = ssl(waves, lengths)
    assert hidden.grad_fn is None and not hidden.requires_grad
    hidden, _ = ssl(waves.requires_grad_(), lengths)
    hidden.square().sum().backward()
    assert all(waves.grad[b, :n].any() for b, n in enumerate(lengths))
    assert all(p.grad is None for p in ssl.parameters())


def test_frozen_is_invisible_to_its_holder(folders, batch):
    frozen = Frozen(SSLUpstream(folders / "hubert-base", trainable=["*"]).train())
    assert not frozen.module.training
    assert not any(p.requires_grad for p in frozen.module.parameters())
    holder = torch.nn.Linear(2, 2)
    holder.ssl = frozen
    assert set(holder.state_dict()) == {"weight", "bias"}
    holder.train().double()
    assert not frozen.module.training
    assert next(frozen.module.parameters()).dtype == torch.float32
    waves, lengths = batch([4000, 5000])
    expected = frozen(waves, lengths)
    torch.testing.assert_close(copy.deepcopy(frozen)(waves, lengths), expected, rtol=0, atol=0)


def test_frozen_pickles_with_a_module_that_does():
    frozen = Frozen(torch.nn.Linear(3, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), frozen(x), rtol=0, atol=0)


def test_frozen_follows_its_inputs_device():
    frozen = Frozen(torch.nn.Linear(3, 2))
    assert frozen(torch.empty(1, 3, device="meta")).device.type == "meta"
    assert frozen.module.weight.device.type == "meta"
    assert Frozen(torch.nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_one_hidden_state(folders, batch, family):
    ssl = SSLUpstream(folders / family)
    waves, lengths = batch([4000, ssl.min_samples, 5000])
    hidden, frames = ssl(waves, lengths)
    for layer in (0, 1, 2, 3, -1):
        one, one_frames = ssl(waves, lengths, layer=layer)
        torch.testing.assert_close(one, hidden[layer], rtol=0, atol=0)
        assert torch.equal(one_frames, frames)
    with pytest.raises(InputError, match="layer 4 is out of range"):
        ssl(waves, lengths, layer=4)


def test_layers_above_one_are_not_computed(folders, batch, family):
    ssl = SSLUpstream(folders / family)
    computed = []
    for index, layer in enumerate(ssl.model.encoder.layers):
        block = layer.ffn1 if hasattr(layer, "ffn1") else layer.feed_forward
        block.register_forward_hook(lambda *_, index=index: computed.append(index))
    ssl(*batch([4000, 5000]), layer=2)
    assert computed == [0, 1]
