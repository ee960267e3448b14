"""Train the demo's three teachers from scratch: python -m demo.train_teachers demo"""

import os

import numpy as np
import torch
import torch.nn.functional as F

import program
from demo import speech
from encoder import EncoderConfig, SpeechEncoder
from export import save_official

CONVOLUTIONS = ((48, 10, 5),) + ((48, 3, 2),) * 4 + ((48, 2, 2),) * 2
TEACHERS = {  # chosen by the scores of the teachers themselves, before any student was trained
    "hubert": {
        "format": "fairseq",
        "steps": 2000,  # the most, in quiet speech alone: the lowest PER of the three
        "lr": 2e-3,  # from random weights
        "voice_groups": 2,  # deep and high voices: states about phonemes, hardly about speakers
        "decibels": (15, 35),  # hardly any noise, as in audio books
        "mixed": 0.0,  # one speaker at a time
    },
    "robust_hubert": {
        "format": "s3prl",
        "steps": 400,  # continues from HuBERT, hence few steps
        "lr": 1e-3,  # lower, since the weights are trained
        "voice_groups": 2,  # HuBERT's clusters
        "decibels": (-10, 5),  # always loud noise: robust, for 1 point of PER in quiet speech
        "mixed": 0.0,  # noise is the only difference from HuBERT
    },
    "wavlm": {
        "format": "microsoft",
        "steps": 1600,  # enough to be the best at speakers
        "lr": 2e-3,  # from random weights too
        "voice_groups": 12,  # two voices per group: states about speakers, at the cost of phonemes
        "decibels": (15, 35),  # as HuBERT
        "mixed": 0.5,  # of the crops have a second speaker, as in arXiv:2110.13900
    },
}
CLUSTERS = 1 + 12 * 12  # silence, and 12 phonemes in up to 12 groups of voices


def train_teachers(folder, seed=0, teachers=TEACHERS, utterances=1200):
    """Trains on the training speakers, and writes three official formats in half precision.

    HuBERT's pre-training (arXiv:2106.07447) predicts the clusters of masked frames. HuBERT's
    clusters come from k-means, which separates voices too. Here a cluster is a phoneme in a group
    of voices of similar pitch, so that the number of groups sets what a teacher learns about
    speakers. Clusters are those of the clean speech, and of the first speaker.
    """
    split = "train-clean-100"
    voices, rooms, _ = speech.make_voices(split, *speech.SPLITS[split][1:])
    rng = np.random.default_rng([seed, 100])
    corpus = []
    for number in range(utterances):
        words = speech.sample_words(rng, 4, 9)
        voice = number % len(voices)
        audio, sounds = speech.synthesise(words, voices[voice], rng)
        corpus.append((audio, sounds, voice / len(voices)))

    os.makedirs(folder, exist_ok=True)
    hubert = None
    for name, settings in teachers.items():
        # WavLM from other weights: states unrelated to HuBERT's, as those of the official ones.
        torch.manual_seed(seed + (name == "wavlm"))
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
        if name == "robust_hubert":
            encoder.load_state_dict(hubert.state_dict())
        rng = np.random.default_rng([seed, 200])
        predict_masked_clusters(encoder, name, settings, corpus, rooms, rng)
        hubert = hubert or encoder
        save_official(encoder, f"{folder}/{name}.pt", settings["format"], torch.float16)


def predict_masked_clusters(encoder, name, settings, corpus, rooms, rng, batch_size=16):
    """HuBERT's pre-training, with equal weights for masked and other frames (its alpha of 0.5)."""
    steps, lr = settings["steps"], settings["lr"]
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
        waveforms, targets = sample_batch(settings, corpus, rooms, batch_size, rng)
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


def sample_batch(settings, corpus, rooms, batch_size, rng, samples=24080):
    """Noisy crops, (batch, samples), and clusters of the clean speech, (batch, frames)."""
    frames = (samples - 400) // 320 + 1
    middles = (np.arange(frames) * 320 + 200) // speech.HOP
    waveforms = np.zeros((batch_size, samples), np.float32)
    targets = np.zeros((batch_size, frames), np.int64)
    for waveform, target in zip(waveforms, targets):
        audio, sounds, voice = corpus[rng.integers(len(corpus))]
        group = int(voice * settings["voice_groups"])
        clusters = np.where(sounds == 0, 0, sounds + 12 * group)
        start = rng.integers(max(1, len(audio) - samples + 1)) // speech.HOP
        audio = audio[start * speech.HOP :][:samples]
        clusters = clusters[start:]
        room = rooms[rng.integers(len(rooms))]
        decibels = rng.uniform(*settings["decibels"])
        audio = speech.add_room_and_noise(audio, room, decibels, rng)
        waveform[: len(audio)] = audio
        if rng.random() < settings["mixed"]:  # a second speaker for up to half of the time
            other = corpus[rng.integers(len(corpus))][0]
            other = other[: rng.integers(samples // 10, samples // 2)]
            place = rng.integers(samples - len(other))
            waveform[place : place + len(other)] += rng.uniform(0.1, 0.5) * other
        inside = middles < len(clusters)
        target[inside] = clusters[middles[inside]]
    return torch.from_numpy(waveforms), torch.from_numpy(targets)


def main(arguments=None):
    program.init()
    with program.one_line_errors():
        parser = program.Parser("Train the demo's three teachers from scratch.")
        parser.add_argument("folder", metavar="DIR", help="gets the three checkpoints")
        folder = parser.parse_args(arguments).folder
    train_teachers(folder)
    print(f"{folder}: {', '.join(f'{name}.pt' for name in TEACHERS)}")


if __name__ == "__main__":
    program.run(main)
