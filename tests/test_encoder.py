"""encoder.py: the network, alone."""

import dataclasses

import pytest
import torch
from conftest import FAMILY, KINDS, LARGE, largest_difference, noise, random_encoder, relative_difference, states

import encoder as encoder_file
from encoder import SpeechEncoder


@pytest.mark.parametrize("kind", FAMILY)
def test_padding_does_not_leak_into_a_shorter_utterance(kind):
    encoder, lengths = random_encoder(**FAMILY[kind]), [12000, 7001, 400]
    batch = noise(3, 12000) + 0.05
    padded = states(encoder, batch, lengths)  # what lies past an utterance's end is anything but silence
    for row, length in enumerate(lengths):
        alone, frames = states(encoder, batch[row : row + 1, :length]), encoder.frames(length)
        for a, b in zip(padded, alone, strict=True):
            assert relative_difference(a[row, :frames], b[0]) < 1e-5
            assert (a[row, frames:] == 0).all()


def test_numbers_that_are_not_finite_in_the_padding_do_not_matter():
    encoder, batch = random_encoder(), noise(2, 6000)
    clean = states(encoder, batch, [6000, 3000])
    batch[1, 3000:] = float("nan")
    assert largest_difference(states(encoder, batch, torch.tensor([6000, 3000])), clean) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_in_the_order_asked_for(kind):
    encoder, waveforms = random_encoder(**KINDS[kind]), noise(1, 4000)
    everything = states(encoder, waveforms)
    assert len(everything) == 5
    for got, layer in zip(states(encoder, waveforms, layers=[4, 0, 2]), [4, 0, 2], strict=True):
        assert torch.equal(got, everything[layer])


def test_nothing_is_computed_above_the_highest_layer_asked_for():
    encoder, ran = random_encoder(), []
    for number, layer in enumerate(encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    states(encoder, noise(1, 4000), layers=[2, 1])
    assert ran == [1, 2]
    states(encoder, noise(1, 4000), layers=[0])
    assert ran == [1, 2]


def test_frames_says_how_many_frames_there_will_be():
    encoder = random_encoder()
    for samples in [400, 719, 720, 5000, 16000, 16001]:
        assert states(encoder, noise(1, samples), layers=[0])[0].shape[1] == encoder.frames(samples)
    assert encoder.frames(399) == encoder.frames(0) == 0
    assert encoder.frames(torch.tensor([399, 400, 16000])).tolist() == [0, 1, 49]


@pytest.mark.parametrize("lengths, expected", [(None, [None] * 4), ([4000, 3000], [(2, 1, 1, 12)] * 4)])
def test_a_mask_is_built_only_where_lengths_are_given(monkeypatch, lengths, expected):
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, attn_mask=None, **keywords):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attention(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(encoder_file.F, "scaled_dot_product_attention", spy)
    states(random_encoder(), noise(2, 4000), lengths)
    assert masks == expected


def test_wavlms_position_bias_is_computed_once_a_forward_pass(monkeypatch):
    encoder, calls = random_encoder(relative_buckets=320), []
    encoder.relative_position.register_forward_hook(lambda *_: calls.append(1))
    states(encoder, noise(1, 4000))
    assert len(calls) == 1


def test_normalisation_makes_loudness_and_offset_not_matter():
    encoder, waveforms = (
        random_encoder(normalize=True, **{k: v for k, v in LARGE.items() if k != "normalize"}),
        noise(2, 6000),
    )
    for a, b in zip(
        states(encoder, waveforms, [6000, 4000]), states(encoder, 3 * waveforms + 0.5, [6000, 4000]), strict=True
    ):
        assert relative_difference(a, b) < 1e-2
    plain = SpeechEncoder(dataclasses.replace(encoder.config, normalize=False)).eval()
    plain.load_state_dict(encoder.state_dict())
    assert relative_difference(states(plain, waveforms)[-1], states(plain, 3 * waveforms + 0.5)[-1]) > 0.1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((noise(1, 4000), None, [5]), "0 to 4"),
        ((noise(1, 399),), "at least one frame"),
        ((noise(4000),), "(batch, samples)"),
        ((noise(2, 4000), [4000, 5000]), "do not fit"),
        ((noise(2, 4000), [4000]), "do not fit"),
        ((noise(2, 4000), [4000, 399]), "too short"),
    ],
)
def test_wrong_calls_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError) as error:
        random_encoder()(*arguments)
    assert words in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_what_the_cpu_gives(kind):
    encoder, waveforms = random_encoder(**KINDS[kind]), noise(2, 9000)
    on_cpu = states(encoder, waveforms, [9000, 6000])
    on_gpu = states(encoder.cuda(), waveforms.cuda(), [9000, 6000])
    assert max(relative_difference(b.cpu(), a) for a, b in zip(on_cpu, on_gpu)) < 1e-3
    with torch.autocast("cuda", torch.bfloat16):
        in_bf16 = states(encoder, waveforms.cuda(), [9000, 6000])
    assert max(relative_difference(b.float().cpu(), a) for a, b in zip(on_cpu, in_bf16)) < 2e-2
