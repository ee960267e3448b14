"""Train the demo's three teachers from scratch: python -m demo.train_teachers demo"""

import os

import numpy as np
import torch
import torch.nn.functional as F

import program
from demo import speech
from encoder import EncoderConfig, SpeechEncoder
from export import save_official

FORMATS = {"hubert": "fairseq", "robust_hubert": "s3prl", "wavlm": "microsoft"}
CONVOLUTIONS = ((48, 10, 5),) + ((48, 3, 2),) * 4 + ((48, 2, 2),) * 2
VOICE_GROUPS = 6
CLUSTERS = 1 + 12 * VOICE_GROUPS  # silence, and 12 phonemes per group of voices


def train_teachers(folder, seed=0, steps=(1600, 300, 300), utterances=1200):
    """Trains on the training speakers, and writes three official formats in half precision.

    HuBERT's pre-training (arXiv:2106.07447) predicts the clusters of masked frames. HuBERT's
    clusters come from k-means, which separates voices too. Here a cluster is a phoneme in one of
    six groups of voices of similar pitch. RobustHuBERT (louder noise) and WavLM (a second
    speaker) continue from HuBERT, with the clusters of the clean speech as targets.
    """
    split = "train-clean-100"
    voices, rooms, _ = speech.make_voices(split, *speech.SPLITS[split][1:])
    rng = np.random.default_rng([seed, 100])
    corpus = []
    for number in range(utterances):
        words = speech.sample_words(rng, 4, 9)
        voice = number % len(voices)
        audio, sounds = speech.synthesise(words, voices[voice], rng)
        group = voice * VOICE_GROUPS // len(voices)
        corpus.append((audio, np.where(sounds == 0, 0, sounds + 12 * group)))

    os.makedirs(folder, exist_ok=True)
    hubert = None
    for name, count, lr in zip(FORMATS, steps, (2e-3, 1e-3, 1e-3)):
        torch.manual_seed(seed)
        config = EncoderConfig(
            CONVOLUTIONS,
            dim=64,
            ffn_dim=128,
            attention_heads=4,
            layers=4,
            pos_kernel=32,
            pos_groups=4,
        )
        if name == "wavlm":
            config.relative_buckets, config.relative_distance = 32, 128
        encoder = SpeechEncoder(config)
        if hubert:  # relative positions, WavLM's alone, remain random
            encoder.load_state_dict(hubert.state_dict(), strict=False)
        rng = np.random.default_rng([seed, 200])
        predict_masked_clusters(encoder, name, corpus, rooms, count, lr, rng)
        hubert = hubert or encoder
        save_official(encoder, f"{folder}/{name}.pt", FORMATS[name], torch.float16)


def predict_masked_clusters(encoder, name, corpus, rooms, steps, lr, rng, batch_size=16):
    """HuBERT's pre-training, with equal weights for masked and other frames (its alpha of 0.5)."""
    masked = None
    mask_embedding = torch.nn.Parameter(0.1 * torch.randn(encoder.config.dim))
    classifier = torch.nn.Linear(encoder.config.dim, CLUSTERS)
    weights = [*encoder.parameters(), mask_embedding, *classifier.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    def mask(module, inputs, x):
        return torch.where(masked[:, :, None], mask_embedding, x)

    hook = encoder.feature_projection.register_forward_hook(mask)
    for step in range(1, steps + 1):
        schedule = min(10 * step / steps, (steps + 1 - step) / (0.9 * steps))
        optimizer.param_groups[0]["lr"] = lr * schedule
        waveforms, targets = sample_batch(name, corpus, rooms, batch_size, rng)
        starts = torch.from_numpy(rng.random(targets.shape) < 0.05).float()
        # Spans of 10 frames, as in HuBERT.
        masked = F.max_pool1d(F.pad(starts[:, None], (9, 0)), 10, 1)[:, 0] > 0
        logits = classifier(encoder(waveforms, layers=[encoder.config.layers])[0])
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = 0.5 * losses[masked].mean() + 0.5 * losses[~masked].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            accuracy = (logits.argmax(-1) == targets)[masked].float().mean()
            line = f"{name}: step {step}/{steps}  loss {loss:.3f}  masked accuracy {accuracy:.0%}"
            print(line, flush=True)
    hook.remove()


def sample_batch(name, corpus, rooms, batch_size, rng, samples=24080):
    """Noisy crops, (batch, samples), and clusters of the clean speech, (batch, frames)."""
    frames = (samples - 400) // 320 + 1
    middles = (np.arange(frames) * 320 + 200) // speech.HOP
    waveforms = np.zeros((batch_size, samples), np.float32)
    targets = np.zeros((batch_size, frames), np.int64)
    lowest = 0 if name == "robust_hubert" else 5  # signal-to-noise ratio in dB
    for waveform, target in zip(waveforms, targets):
        audio, clusters = corpus[rng.integers(len(corpus))]
        start = rng.integers(max(1, len(audio) - samples + 1)) // speech.HOP
        audio = audio[start * speech.HOP :][:samples]
        clusters = clusters[start:]
        room = rooms[rng.integers(len(rooms))]
        audio = speech.add_room_and_noise(audio, room, rng.uniform(lowest, 20), rng)
        waveform[: len(audio)] = audio
        if name == "wavlm" and rng.random() < 0.5:  # another speaker for up to half of the time
            other = corpus[rng.integers(len(corpus))][0]
            other = other[: rng.integers(samples // 10, samples // 2)]
            place = rng.integers(samples - len(other))
            waveform[place : place + len(other)] += rng.uniform(0.1, 0.5) * other
        inside = middles < len(clusters)
        target[inside] = clusters[middles[inside]]
    return torch.from_numpy(waveforms), torch.from_numpy(targets)


def main(arguments=None):
    with program.one_line_errors():
        parser = program.Parser("Train the demo's three teachers from scratch.")
        parser.add_argument("folder", metavar="DIR", help="gets the three checkpoints")
        folder = parser.parse_args(arguments).folder
    program.find_device(cpu_ok=True)
    train_teachers(folder)
    print(f"{folder}: {', '.join(f'{name}.pt' for name in FORMATS)}")


if __name__ == "__main__":
    program.run(main)
