import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig

from posinv.errors import InputError
from posinv.ssl import exact
from posinv.ssl.exact import extract, model_output
from posinv.ssl.upstream import SSLUpstream

pytestmark = pytest.mark.usefixtures("seeded")


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def states(model, values, **options):
    """The hidden states (L + 1, F, D) that transformers gives for one utterance (1, T)."""
    return torch.stack(model(values, output_hidden_states=True, **options).hidden_states)[:, 0]


def alone(folder, wave):
    """The oracle: transformers and its feature extractor on one utterance."""
    model = AutoModel.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    if "input_features" in values:  # the last pair may have one filter bank alone
        return states(model, values["input_features"][:, : values["attention_mask"].sum()])
    return states(model, values["input_values"])


def input_of(ssl, wave):
    """What transformers' model takes for one utterance (1, T), with a gradient."""
    if ssl.config.model_type == "wav2vec2-bert":
        wave = wave.double() * 2**15
        x = kaldi.fbank(wave, num_mel_bins=80, window_type="povey", dither=0.0)
        x = (x - x.mean(0)) / (x.var(0) + 1e-7).sqrt()
        return x[: len(x) // 2 * 2].reshape(1, -1, 160).float()
    if ssl.normalize:
        return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
    return wave


def frames_of(family, samples):
    """How many frames there are in so many samples, counted by hand."""
    if "w2v-bert" in family:
        return ((samples - 400) // 160 + 1) // 2
    frames = (samples - 400) // 320 + 1
    return frames // {"sew": 2, "sew-odd": 3}.get(family, 1)


@torch.no_grad()
def assert_exact(ssl, waves, lengths, oracle, family="hubert"):
    """A batch gives what the oracle gives for each utterance alone, and zero past its end."""
    hidden, frames = ssl(waves, lengths)
    assert hidden.shape == (ssl.num_layers, len(waves), frames.max(), ssl.output_size)
    assert frames.tolist() == [frames_of(family, n) for n in lengths.tolist()]
    for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
        reference = oracle(waves[i, :n])
        assert hidden[:, i, :m].shape == reference.shape
        for value, expected in zip(hidden[:, i, :m], reference, strict=True):
            # Wav2Vec2-BERT's feature extractor rounds to float32 before it normalises.
            assert relative_error(value, expected) < (1e-4 if "w2v-bert" in family else 1e-5)
        assert not hidden[:, i, m:].any()


def test_batch_gives_what_transformers_gives_alone(folders, family, batch):
    ssl = SSLUpstream(folders / family)
    one, hop = ssl.min_samples, ssl.hop
    waves, lengths = batch([16000, one, 7777, one + hop - 1, one + hop, 23456], scale=0.1)
    assert_exact(ssl, waves + 0.05, lengths, partial(alone, folders / family), family)


def test_gradient_wrt_waveform_is_the_lone_utterances(folders, family, batch):
    ssl = SSLUpstream(folders / family)
    # One frame; but Wav2Vec2-BERT brings two filter banks to +-0.7, so they have no gradient.
    shortest = ssl.min_samples + ("w2v-bert" in family) * ssl.hop
    waves, lengths = batch([6000, shortest, 3217])
    waves.requires_grad_()
    hidden, frames = ssl(waves, lengths)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
        wave = waves[i : i + 1, :n].detach().requires_grad_()
        expected = states(ssl.model, input_of(ssl, wave))
        assert relative_error(hidden[:, i, :m], expected) < 1e-5
        (expected * weights[:, i, :m]).sum().backward()
        assert relative_error(waves.grad[i, :n], wave.grad[0]) < 1e-4
        assert not waves.grad[i, n:].any()


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_thirty_seconds_beside_one_frame(folders, name, batch):
    assert_exact(SSLUpstream(folders / name), *batch([400, 480000]), partial(alone, folders / name))


@pytest.mark.parametrize("frames", [1, 3])
def test_pieces_of_long_audio_have_no_seams(folders, family, frames, monkeypatch, batch):
    monkeypatch.setattr(exact, "_PIECE_BYTES", frames * 64 * 4 * 16)
    ssl = SSLUpstream(folders / family)
    one = ssl.min_samples
    waves, lengths = batch([one, one + 320, one + 959, one + 960, 16000], scale=0.1)
    assert_exact(ssl, waves + 0.05, lengths, partial(alone, folders / family), family)


def test_a_gradient_after_inference(folders, batch):
    exact._mel_filters.cache_clear()
    ssl = SSLUpstream(folders / "w2v-bert")
    waves, lengths = batch([4000, 5000])
    with torch.inference_mode():
        expected, _ = ssl(waves, lengths)
    hidden, _ = ssl(waves.requires_grad_(), lengths)
    torch.testing.assert_close(hidden, expected)
    hidden.sum().backward()
    assert waves.grad.isfinite().all()


def test_silence(folders, family, batch):
    waves, lengths = batch([5000, 8000])
    waves[0] = 0.0
    ssl = SSLUpstream(folders / family)
    assert_exact(ssl, waves, lengths, partial(alone, folders / family), family)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(400, 9000), min_size=1, max_size=5))
def test_any_lengths(folders, batch, lengths):
    ssl = SSLUpstream(folders / "hubert-base")
    assert_exact(ssl, *batch(lengths), lambda wave: states(ssl.model, wave[None]))


def test_full_size_hubert_base(tmp_path, batch):
    HubertConfig().save_pretrained(tmp_path)
    ssl = SSLUpstream(tmp_path, random_init=True)
    assert (ssl.num_layers, ssl.output_size, ssl.hop, ssl.min_samples) == (13, 768, 320, 400)
    waves, lengths = batch([8000, 48000])  # one piece, and several
    assert_exact(ssl, waves, lengths, lambda wave: states(ssl.model, wave[None]))


def test_no_layer_drop_nor_spec_augment_in_training(folders, batch):
    ssl = SSLUpstream(folders / "hubert-base", trainable=["*"])
    ssl.config.layerdrop = 1.0
    ssl.config.mask_time_prob = 0.9
    ssl.config.mask_feature_prob = 0.9
    for module in ssl.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    waves, lengths = batch([8000, 5000])
    trained = ssl.train()(waves, lengths)[0]
    torch.testing.assert_close(trained, ssl.eval()(waves, lengths)[0])


def state_of(ssl):
    """What a forward must not change: attributes, hooks, configuration, weights."""
    modules = {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in ssl.named_modules()
    }
    weights = {name: value.clone() for name, value in ssl.state_dict().items()}
    return modules, ssl.config.to_dict(), weights


def assert_state(ssl, before):
    modules, config, weights = state_of(ssl)
    assert modules == before[0]
    assert config == before[1]
    assert all(torch.equal(weights[name], value) for name, value in before[2].items())


def test_the_model_is_left_as_it_was(folders, batch):
    ssl = SSLUpstream(folders / "hubert-base", trainable=["encoder.*"]).train()
    before = state_of(ssl)
    found = []
    norm = ssl.model.feature_extractor.conv_layers[0].layer_norm
    # Also while a forward runs.
    ssl.model.encoder.layer_norm.register_forward_hook(
        lambda *_: found.append((dict(vars(norm)), ssl.config.to_dict()))
    )
    ssl(*batch([4000, 5000]))
    ssl.model.encoder.layer_norm._forward_hooks.clear()
    assert_state(ssl, before)
    assert "forward" not in found[0][0] and found[0][1] == before[1]
    clone = copy.deepcopy(ssl).eval()
    waves, lengths = batch([4000, 5000])
    torch.testing.assert_close(clone(waves, lengths), ssl.eval()(waves, lengths), rtol=0, atol=0)


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize(
    "name",
    [
        *("hubert-base", "wavlm-base", "wavlm-large", "data2vec", "sew"),
        *("conformer-relative", "conformer-rotary-large", "w2v-bert"),
    ],
)
def test_threads_share_a_model(folders, batch, name, threads):
    ssl = SSLUpstream(folders / name)
    before = state_of(ssl)
    batches = [batch([6000 + 999 * i, 800, 3000 + 555 * i]) for i in range(threads)]
    start = Barrier(threads)

    def features(waves, lengths):
        with torch.no_grad():
            hidden, _ = ssl(waves, lengths)
        waves = waves.clone().requires_grad_()
        with_gradient, _ = ssl(waves, lengths)
        (gradient,) = torch.autograd.grad(with_gradient.square().sum(), waves)
        return hidden, with_gradient.detach(), gradient

    def work(one):
        start.wait()
        return [features(*one) for _ in range(5)]

    expected = [features(*one) for one in batches]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, batches))
    for result, reference in zip(results, expected, strict=True):
        for found in result:
            torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert_state(ssl, before)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "trainable", [["*"], ["feature_projection.*", "encoder.*"], ["encoder.layers.[12].*"]]
)
@pytest.mark.parametrize(
    "name",
    [
        *("hubert-base", "wavlm-base", "wavlm-large", "wav2vec2-base", "wav2vec2-large", "sew"),
        *("conformer-relative", "conformer-rotary-large", "w2v-bert"),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(folders, batch, name, trainable, use_reentrant):
    ssl = SSLUpstream(folders / name, trainable=trainable).train()
    waves, lengths = batch([6000, 800, 3217])
    calls = []
    last = ssl.model.encoder.layers[-1]
    query = last.self_attn.linear_q if hasattr(last, "self_attn") else last.attention.q_proj
    query.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        ssl.zero_grad()
        torch.manual_seed(1)  # dropout is on
        hidden, _ = ssl(waves, lengths)
        (hidden * torch.randn(hidden.shape)).sum().backward()
        return {name: p.grad.clone() for name, p in ssl.named_parameters() if p.requires_grad}

    expected = gradients()
    assert len(calls) == 1
    ssl.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    found = gradients()
    assert len(calls) == 2
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


def test_model_output_is_transformers(folders, family):
    ssl = SSLUpstream(folders / family, normalize=False)
    wave = torch.randn(1, 5000)
    with torch.no_grad():
        hidden, _ = ssl(wave, [5000], layer=-1)
        expected = ssl.model(input_of(ssl, wave)).last_hidden_state
        output = model_output(ssl.model, hidden)
        if family == "sew":  # 15 frames, so that one has no pair
            assert not expected[:, 14:].any()
            expected = expected[:, :14]
        assert output.shape == expected.shape
        assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["hubert-base", "wavlm-large", "data2vec", "sew", "conformer-rotary-large", "w2v-bert"]
)
def test_masked_frames_get_the_mask_embedding(folders, batch, name):
    ssl = SSLUpstream(folders / name, normalize=False)
    waves, lengths = batch([4000, 5000])
    before_pooling = "hubert" if name == "sew" else name
    longest = frames_of(before_pooling, 5000)
    mask = torch.rand(2, longest) < 0.5
    hidden, frames = extract(ssl.model, waves, lengths, time_mask=mask)
    for i, (n, m) in enumerate(zip(lengths.tolist(), frames, strict=True)):
        own = mask[i : i + 1, : frames_of(before_pooling, n)]
        expected = states(ssl.model, input_of(ssl, waves[i : i + 1, :n]), mask_time_indices=own)
        assert relative_error(hidden[:, i, :m], expected) < 1e-5
    with pytest.raises(
        InputError, match=rf"time_mask must be \(2, {longest}\), got shape \(2, {longest - 1}\)"
    ):
        extract(ssl.model, waves, lengths, time_mask=mask[:, :-1])
    del ssl.model.masked_spec_embed
    with pytest.raises(InputError, match="this SSL model has no mask embedding"):
        extract(ssl.model, waves, lengths, time_mask=mask)


@pytest.mark.parametrize("name", ["hubert-batchnorm", "conformer-relative"])
def test_batch_norm_uses_its_stored_statistics_in_training(folders, batch, name):
    ssl = SSLUpstream(folders / name, trainable=["*"]).train()
    for module in ssl.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    statistics = {n: b.clone() for n, b in ssl.named_buffers() if "running" in n}
    assert statistics
    waves, lengths = batch([8000, 5000])
    trained = ssl(waves, lengths)[0]
    assert all(torch.equal(statistics[n], b) for n, b in ssl.named_buffers() if n in statistics)
    torch.testing.assert_close(trained, ssl.eval()(waves, lengths)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_waves_of_any_width_are_taken_in_the_models(folders, batch, name, dtype):
    ssl = SSLUpstream(folders / name, normalize=False)
    waves, lengths = batch([4000, 5000])
    waves = waves.to(dtype)
    hidden, _ = ssl(waves, lengths)
    torch.testing.assert_close(hidden, ssl(waves.float(), lengths)[0], rtol=0, atol=0)
    expected = ssl(waves.double(), lengths)[0].double()
    ours, _ = ssl.to(dtype)(waves, lengths)
    assert ours.dtype == dtype
    assert relative_error(ours.double(), expected) < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_a_model_of_another_width_has_no_seams(folders, batch, name, monkeypatch):
    monkeypatch.setattr(exact, "_PIECE_BYTES", 3 * 64 * 4 * 16)
    ssl = SSLUpstream(folders / name).double()
    waves, lengths = batch([16000, 5000])
    with torch.no_grad():
        pieces, _ = ssl(waves, lengths)
    whole, _ = ssl(waves.requires_grad_(), lengths)
    assert relative_error(pieces, whole) < 1e-12


def test_half_precision_input_is_normalised_in_full(folders, batch):
    ssl = SSLUpstream(folders / "hubert-large")
    waves, lengths = batch([40000, 5000], scale=30.0)  # the sum of squares overflows float16
    waves = waves.half()
    torch.testing.assert_close(ssl(waves, lengths), ssl(waves.float(), lengths))


@pytest.mark.parametrize("make", [list, np.array, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_lengths_may_be_lists_and_arrays(folders, batch, make):
    ssl = SSLUpstream(folders / "hubert-base")
    waves, lengths = batch([4000, 5000])
    hidden, frames = ssl(waves, make([4000, 5000]))
    torch.testing.assert_close((hidden, frames), ssl(waves, lengths), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("waves", "lengths", "message"),
    [
        (torch.zeros(2, 1000), [1000, 399], r"utterance 1 .*399 samples.* 400 "),
        (torch.zeros(2, 1000), torch.tensor([1001, 400]), r"lengths\[0\] is 1001.* 1\.\.1000"),
        (torch.zeros(2, 1000), [1000, -5], r"lengths\[1\] is -5"),
        (torch.zeros(2, 1000), [1000.0, 400.0], "lengths must be integers"),
        (torch.zeros(2, 1000), np.array([1000.5, 400]), "lengths must be integers"),
        (torch.zeros(2, 1000), torch.ones(2), "lengths must be integers"),
        (torch.zeros(2, 1000), [1000], r"lengths must be \(2,\).*got shape \(1,\)"),
        (torch.zeros(2, 1000), [[1000, 400]], r"lengths must be \(2,\).*got shape \(1, 2\)"),
        (torch.zeros(2, 1000), 1000, r"lengths must be \(2,\).*got shape \(\)"),
        (torch.zeros(2, 1000), "ab", "lengths must be"),
        (torch.zeros(2, 0), [0, 0], "must be at least 1"),
        (torch.zeros(0, 1000), [], "at least one utterance"),
        (torch.zeros(1000), [1000], r"\(B, T\), got torch.float32 of shape \(1000,\)"),
        (torch.zeros(2, 1, 1000), [1000, 400], r"\(B, T\), got .*\(2, 1, 1000\)"),
        (torch.zeros(2, 1000, dtype=torch.int16), [1000, 400], "floating-point.*torch.int16"),
        (np.zeros((2, 1000), np.float32), [1000, 400], "floating-point tensor.*ndarray"),
    ],
)
def test_bad_input_is_told_in_one_line(folders, waves, lengths, message):
    with pytest.raises(InputError, match=message) as caught:
        SSLUpstream(folders / "hubert-base")(waves, lengths)
    assert "\n" not in str(caught.value)
