"""encoder.py: the network by itself."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    FAMILY,
    KINDS,
    LARGE,
    ROOT,
    environment,
    largest_difference,
    noise,
    random_encoder,
    relative_difference,
    states,
)

import encoder as encoder_file


@pytest.mark.parametrize("kind", FAMILY)
def test_padding_does_not_change_an_utterance(kind):
    encoder = random_encoder(**FAMILY[kind])
    lengths = [12000, 7001, 400]
    batch = noise(3, 12000) + 0.05  # the padding is not silent
    padded = states(encoder, batch, lengths)
    batch[1, 7001:] = float("nan")
    assert largest_difference(states(encoder, batch, torch.tensor(lengths)), padded) == 0
    for row, length in enumerate(lengths):
        alone = states(encoder, batch[row : row + 1, :length])
        frames = encoder.frames(length)
        for a, b in zip(padded, alone, strict=True):
            assert relative_difference(a[row, :frames], b[0]) < 2e-6
            assert (a[row, frames:] == 0).all()


@pytest.mark.parametrize("kind", FAMILY)
def test_bf16_gives_the_states_of_float32(kind):
    encoder, waveforms = random_encoder(**FAMILY[kind]), noise(2, 8000)
    expected = states(encoder, waveforms)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = states(encoder, waveforms)
    for found in (mixed, states(encoder.bfloat16(), waveforms)):
        for state, exact in zip(found, expected, strict=True):
            assert relative_difference(state.float(), exact) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_in_the_requested_order_and_none_above_them_is_computed(kind):
    encoder, computed = random_encoder(**KINDS[kind]), []
    everything = states(encoder, noise(1, 4000))
    assert len(everything) == 5
    for number, layer in enumerate(encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: computed.append(number))
    for layers in ([4, 0, 2], [2, 1], [0]):
        computed.clear()
        found = states(encoder, noise(1, 4000), layers=layers)
        assert largest_difference(found, [everything[layer] for layer in layers]) == 0
        assert computed == list(range(1, max(layers) + 1))


@pytest.mark.parametrize("samples", [400, 719, 720, 5000, 16000, 16001])
def test_frames_is_the_number_of_frames(samples):
    encoder = random_encoder()
    frames = states(encoder, noise(1, samples), layers=[0])[0].shape[1]
    assert encoder.frames(samples) == frames
    assert encoder.frames(torch.tensor([399, samples])).tolist() == [0, frames]


@pytest.mark.parametrize(
    "lengths, shape", [(None, None), ([4000, 4000], None), ([4000, 3000], (2, 1, 1, 12))]
)
def test_attention_has_a_mask_only_if_something_is_padded(monkeypatch, lengths, shape):
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*qkv, attn_mask, dropout_p):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attention(*qkv, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(encoder_file.F, "scaled_dot_product_attention", spy)
    states(random_encoder(), noise(2, 4000), lengths)
    assert masks == [shape] * 4


def test_normalisation_removes_loudness_and_offset():
    waveforms, lengths = noise(2, 6000), [6000, 4000]
    for normalize, low, high in ((True, 0, 1e-2), (False, 0.1, 10)):
        encoder = random_encoder(**LARGE | {"normalize": normalize})
        a = states(encoder, waveforms, lengths)[-1]
        b = states(encoder, 3 * waveforms + 0.5, lengths)[-1]
        assert low <= relative_difference(a, b) < high


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((noise(1, 4000), None, [5]), "0 to 4"),
        ((noise(1, 399),), "399 samples are too short"),
        ((noise(2, 4000), [4000, 5000]), "[4000, 5000]: expected 2 lengths"),
        ((noise(2, 4000), [4000]), "[4000]: expected 2 lengths"),
        ((noise(2, 4000), [4000, 399]), "one frame"),
    ],
)
def test_wrong_arguments_are_errors(arguments, words):
    with pytest.raises(ValueError) as error:
        random_encoder()(*arguments)
    assert words in str(error.value)


def test_the_method_files_need_torch_alone(tmp_path):
    for name in ("encoder.py", "aggregate.py", "losses.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = """
import sys
sys.modules |= dict.fromkeys(["soundfile", "torchaudio", "filelock", "transformers"])
import torch, aggregate, encoder, losses
states = encoder.SpeechEncoder(encoder.EncoderConfig(layers=1))(torch.randn(1, 4000))
print(float(losses.distillation_loss(states, aggregate.average([states]))[1].sum()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0.0\n", done.stderr
