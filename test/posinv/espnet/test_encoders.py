import pytest
import torch
from torch import nn

from posinv.errors import InputError
from posinv.espnet.encoders import BLSTMEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return BLSTMEncoder(input_size=6, hidden_size=5, num_layers=2, dropout=0.5)


def by_hand(encoder, x):
    """The expected output for one utterance ``(F, D)``: an LSTM for each layer and direction."""
    for layer in range(2):
        directions = []
        for suffix in ("", "_reverse"):
            lstm = nn.LSTM(x.shape[1], 5)
            names = [f"{name}_l{layer}{suffix}" for name in ("weight_ih", "weight_hh")]
            names += [f"{name}_l{layer}{suffix}" for name in ("bias_ih", "bias_hh")]
            state = {name.removesuffix(suffix)[:-1] + "0": name for name in names}
            lstm.load_state_dict({key: getattr(encoder.blstm, state[key]) for key in state})
            y = lstm(x.flip(0) if suffix else x)[0]
            directions.append(y.flip(0) if suffix else y)
        x = torch.cat(directions, dim=1)
    return x


def test_batch_gives_what_utterances_give_alone(encoder):
    encoder.eval()
    lengths = torch.tensor([3, 7, 1])  # in no order
    x = torch.randn(3, 9, 6)
    y, y_lengths, states = encoder(x, lengths)
    assert y.shape == (3, 7, encoder.output_size()) == (3, 7, 10)
    assert torch.equal(y_lengths, lengths)
    assert states is None
    for b, length in enumerate(lengths):
        torch.testing.assert_close(y[b, :length], by_hand(encoder, x[b, :length]))
        assert not y[b, length:].any()


@pytest.mark.parametrize("lengths", [[3, 7, 1], [5, 5], [1]])
def test_gradients_are_those_of_utterances_alone(encoder, lengths):
    """By torch's bidirectional LSTM; none comes from padding, whatever it holds."""
    encoder.eval()
    x = torch.randn(len(lengths), 9, 6)
    alone = [row[:length].clone().requires_grad_() for row, length in zip(x, lengths, strict=True)]
    sum(encoder.blstm(one)[0].square().sum() for one in alone).backward()
    expected = [weight.grad.clone() for weight in encoder.parameters()]
    encoder.zero_grad()
    for row, length in zip(x, lengths, strict=True):
        row[length:] = torch.nan
    x.requires_grad_()
    encoder(x, torch.tensor(lengths))[0].square().sum().backward()
    for weight, gradient in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    for b, one in enumerate(alone):
        torch.testing.assert_close(x.grad[b, : lengths[b]], one.grad)
        assert not x.grad[b, lengths[b] :].any()


def test_dropout_between_layers_in_training_alone(encoder):
    """With none after the last layer, only that between the two is drawn."""
    encoder.dropout.p = 0.0
    x, lengths = torch.randn(1, 9, 6), torch.tensor([9])
    first, second = (encoder.train()(x, lengths)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    encoder.blstm.dropout = 0.0
    torch.testing.assert_close(encoder(x, lengths)[0][0], by_hand(encoder, x[0]))


def test_stacked_frames_are_one_frame(encoder):
    """Zeros complete the last group, whatever the padding holds."""
    stacked = BLSTMEncoder(input_size=2, hidden_size=5, num_layers=2, dropout=0.5, stack=3).eval()
    stacked.load_state_dict(encoder.eval().state_dict())
    lengths = torch.tensor([7, 1, 6])
    x = torch.randn(3, 8, 2)
    y, y_lengths, _ = stacked(x, lengths)
    assert y_lengths.tolist() == [3, 1, 2]
    for b, length in enumerate(lengths.tolist()):
        frames = torch.cat([x[b, :length], torch.zeros(-length % 3, 2)])
        groups = torch.stack([torch.cat([*frames[i : i + 3]]) for i in range(0, len(frames), 3)])
        torch.testing.assert_close(y[b, : len(groups)], by_hand(encoder, groups))
        assert not y[b, len(groups) :].any()
    for bad in (0, 1.5, "2"):
        with pytest.raises(InputError, match="stack: must be a whole number from 1"):
            BLSTMEncoder(input_size=2, stack=bad)


def test_dropout_after_the_last_layer_too(encoder):
    x = torch.randn(1, 400, 6)
    lengths = torch.tensor([400])
    share = (encoder.train()(x, lengths)[0] == 0).float().mean()
    assert 0.45 < share < 0.55
    assert (encoder.eval()(x, lengths)[0] != 0).all()


def test_espnet_finds_it():
    from espnet2.tasks import asr

    import posinv.espnet  # noqa: F401

    assert asr.encoder_choices.get_class("blstm") is BLSTMEncoder
