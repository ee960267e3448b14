"""All that --demo makes: synthetic speech, a comparison of scores, tables of speakers and emotions, and the tiny teachers.

    python demo.py --teachers demo          # trains the three teachers in demo/ again, from nothing

README's promise kept here: the demo needs no download, and writes in data/demo and runs/demo-avg alone.
"""

import processes

import argparse
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from data import SAMPLE_RATE, files_under, read_audio
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from safe_files import locked, write_text, write_whole
from student import Student, load_student, save_student
from teachers import load_teacher

DATA = "data/demo"
RUN = "runs/demo-avg"
STUDENT = f"{RUN}/student.pt"
SPEAKERS = f"{DATA}/speakers.csv"
EMOTIONS = f"{DATA}/emotion/emotions.csv"
TEACHERS = {"hubert": "fairseq", "robust_hubert": "s3prl", "wavlm": "microsoft"}  # and the form each is written in
SPLITS = {
    "train-clean-100": (240, 24, 8),
    "dev-clean": (32, 8, 3),
    "test-clean": (64, 16, 4),
}  # utterances, speakers, rooms


def teachers():
    """The teachers' paths, as --teachers takes them."""
    return [os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo", f"{name}.pt") for name in TEACHERS]


# ---------------------------------------------------------------- what --demo finds


def prepare(folder=DATA):
    """The synthetic corpus, written once, by one process a machine. Raises ValueError where the folder is another."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    with locked(folder + ".lock"):
        if not os.path.isdir(folder):
            shutil.rmtree(folder + ".partial", ignore_errors=True)
            write_corpus(folder + ".partial")
            os.rename(folder + ".partial", folder)
    for path in teachers():
        try:
            load_teacher(path)
        except (OSError, ValueError) as error:
            again = f"python demo.py --teachers {os.path.relpath(os.path.dirname(path))}"
            raise ValueError(f"{error}; {again} makes the demo's teachers again") from None
    missing = [] if os.path.isfile(os.path.join(folder, "lexicon.txt")) else ["lexicon.txt"]
    for split, (utterances, *_) in SPLITS.items():
        found = sum(path.endswith(".flac") for path in files_under(folder, split))
        missing += [f"{utterances - found} of {utterances} files of {split}"] if found < utterances else []
    if missing:
        raise ValueError(
            f"{folder}: not a whole demo, {', '.join(missing)} missing; delete it, and --demo makes it again"
        )


def student():
    """The demo's corpus and student, the latter made by train.py where it is not there yet."""
    prepare()
    if not os.path.exists(STUDENT):
        print(f"demo: there is no {STUDENT} yet; python train.py --demo makes it", flush=True)
        train = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        done = subprocess.run([sys.executable, train, "--demo", "--out", RUN])
        if done.returncode:
            sys.exit(done.returncode)


def compare(judge, args, show):
    """Judges the student beside its first teacher, itself untrained and filter banks, and prints a table.

    judge(args): the result of the upstream that args name. show(args, result): prints it as a person reads it.
    An --upstream of the user's own is judged alone.
    """
    if args.upstream != STUDENT:
        return show(args, judge(args))
    with processes.together():
        trained = load_student(STUDENT)
        torch.manual_seed(args.seed)
        heads = [(name, head[-1].out_features) for name, head in zip(trained.head_names, trained.heads)]
        untrained = Student(trained.encoder.config, heads)
        write_whole(f"{RUN}/untrained.pt", lambda file: save_student(untrained, file))
    upstreams = {"first teacher": (teachers()[0], "-teacher"), "student": (STUDENT, "")}
    upstreams |= {"student untrained": (f"{RUN}/untrained.pt", "-untrained"), "filter banks": ("fbank", "-fbank")}
    rows = []
    for name, (upstream, ending) in upstreams.items():
        print(f"\n{name}: {os.path.relpath(upstream) if ending != '-fbank' else upstream}", flush=True)
        mine = argparse.Namespace(**vars(args) | {"upstream": upstream, "out": args.out + ending})
        result = judge(mine)
        if upstream == STUDENT:
            show(mine, result)
        low, high = result["interval"]
        rows.append(f"  {name:18}{result[result['metric'].lower()]:>8.1%}   {low:.1%} to {high:.1%}")
    print(f"\n{result['metric']} on speech that no probe was trained on, 95% intervals", *rows, sep="\n", flush=True)


def speakers(path=SPEAKERS):
    """A table of the training speakers for evaluate_sid.py, each one's utterances dealt to train, dev and test."""
    root, folder = os.path.dirname(path), "train-clean-100"
    lines = ["path,label,split\n"]
    for speaker in sorted(os.listdir(os.path.join(root, folder))):
        place = f"{folder}/{speaker}/1"
        files = sorted(name for name in os.listdir(os.path.join(root, place)) if name.endswith(".flac"))
        splits = ["test", "dev", "train", "train", "train"]
        lines += [f"{place}/{name},{speaker},{splits[number % 5]}\n" for number, name in enumerate(files)]
    write_text(path, "".join(lines))


def emotions(path=EMOTIONS):
    """A table for evaluate_er.py of four ways to say the demo's sentences, five folds of two speakers, made once.

    As they are, fast and high, slow and soft, loud and rough.
    """
    if os.path.exists(path):
        return
    folder, source, lines = os.path.dirname(path), f"{DATA}/train-clean-100", ["path,label,fold\n"]
    os.makedirs(folder, exist_ok=True)
    ways = {
        "neutral": lambda x, time: x,
        "happy": lambda x, time: np.interp(time * 1.25, time, x)[: int(len(x) / 1.25)],
        "sad": lambda x, time: 0.3 * np.interp(np.arange(int(len(x) / 0.85)) * 0.85, time, x),
        "angry": lambda x, time: np.clip(6 * x, -0.9, 0.9),
    }
    for place, speaker in enumerate(sorted(os.listdir(source))[:10]):
        names = sorted(name for name in os.listdir(f"{source}/{speaker}/1") if name.endswith(".flac"))
        for number, name in enumerate(names):
            audio = read_audio(f"{source}/{speaker}/1/{name}").numpy()
            label, way = list(ways.items())[(number + place // 5 * 2) % 4]
            soundfile.write(os.path.join(folder, name), way(audio, np.arange(len(audio))), SAMPLE_RATE)
            lines.append(f"{name},{label},{place % 5}\n")
    write_text(path, "".join(lines))


# ---------------------------------------------------------------- the synthetic speech

# ARPAbet phonemes: (formants in Hz, voicing 0..1, noise band in Hz or None, seconds)
PHONEMES = {
    "AA": ((730, 1090, 2440), 1.0, None, 0.16),
    "IY": ((270, 2290, 3010), 1.0, None, 0.15),
    "UW": ((300, 870, 2240), 1.0, None, 0.15),
    "EH": ((530, 1840, 2480), 1.0, None, 0.14),
    "OW": ((500, 900, 2400), 1.0, None, 0.16),
    "M": ((250, 1100, 2100), 0.5, None, 0.08),
    "N": ((250, 1500, 2400), 0.5, None, 0.08),
    "L": ((360, 1000, 2700), 0.7, None, 0.08),
    "S": ((300, 1600, 2600), 0.0, (4500, 7500), 0.11),
    "SH": ((300, 1700, 2400), 0.0, (2200, 5000), 0.11),
    "F": ((300, 1200, 2300), 0.0, (1200, 7000), 0.09),
    "Z": ((300, 1600, 2600), 0.4, (4500, 7500), 0.09),
}
SILENCE = ((500, 1500, 2500), 0.0, None)
SOUNDS = ["silence", *PHONEMES]
WORDS = {
    "SEE": "S IY1", "SHE": "SH IY1", "FEE": "F IY1", "KNEE": "N IY1", "ME": "M IY1", "ZOO": "Z UW1", "SHOE": "SH UW1",
    "LOW": "L OW1", "NO": "N OW1", "SHOW": "SH OW1", "SO": "S OW1", "MOON": "M UW1 N", "NOON": "N UW1 N",
    "SOON": "S UW1 N", "FOOL": "F UW1 L", "LESS": "L EH1 S", "MESS": "M EH1 S", "SHELL": "SH EH1 L", "FELL": "F EH1 L",
    "SEAL": "S IY1 L", "MEAL": "M IY1 L", "FOAM": "F OW1 M", "LOAN": "L OW1 N", "NOSE": "N OW1 Z", "MA": "M AA1",
    "LA": "L AA1", "SHAH": "SH AA1",
}  # fmt: skip
CONTROL = 80  # samples between the points where the voice moves: 200 a second


def write_corpus(folder, seed=0, splits=None, decibels=(5, 20)):
    """Writes about 10 minutes of formant-synthesised words in LibriSpeech's layout; the same bytes for the same seed.

    folder gets {train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/*.flac with .trans.txt, and lexicon.txt
    (WORD<tab>PHONEMES, ARPAbet with stress). Every utterance sounds in a room and in noise that many decibels below it;
    no speaker and no room is in two splits. splits: {name: (utterances, speakers, rooms)}, SPLITS if nothing else.
    """
    speaker, splits = 100, splits or SPLITS
    for split, (utterances, *sizes) in splits.items():
        voices, rooms, rng = cast(split, *sizes, seed)
        for voice in voices:
            speaker += 1
            place = os.path.join(folder, split, str(speaker), "1")
            os.makedirs(place, exist_ok=True)
            lines = []
            for number in range(utterances // len(voices)):
                words = [str(word) for word in rng.choice(list(WORDS), rng.integers(3, 8))]
                name = f"{speaker}-1-{number:04d}"
                audio = record(say(words, voice, rng)[0], rooms[rng.integers(len(rooms))], rng.uniform(*decibels), rng)
                audio = (audio * 32767).astype(np.int16)
                soundfile.write(os.path.join(place, name + ".flac"), audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {' '.join(words)}\n")
            write_text(os.path.join(place, f"{speaker}-1.trans.txt"), "".join(lines))
    write_text(
        os.path.join(folder, "lexicon.txt"), "".join(f"{word}\t{said}\n" for word, said in sorted(WORDS.items()))
    )


def cast(split, speakers, rooms, seed=0):
    """(voices, rooms, a random generator) of a split: the same for the same seed, and no split's are another's."""
    rng = np.random.default_rng([seed, *split.encode()])
    voices = []
    for pitch in np.geomspace(85, 250, speakers) * rng.uniform(0.97, 1.03, speakers):
        throat = 0.85 + 0.3 * pitch / 230 + rng.uniform(-0.1, 0.1)  # higher voices have higher formants
        voices.append({"pitch": pitch, "throat": throat, "pace": rng.uniform(0.75, 1.2), "tilt": rng.uniform(0.3, 0.8)})
    responses = []
    for seconds in rng.uniform(0.15, 0.5, rooms):  # until the echo has fallen by 60 dB
        length = int(seconds * SAMPLE_RATE)
        echo = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
        echo[:48] = 0  # the nearest wall is half a metre away
        echo *= rng.uniform(0.2, 0.6) / np.sqrt((echo**2).sum())
        responses.append(np.concatenate([[1.0], echo[1:]]))
    return voices, responses, rng


def say(words, voice, rng):
    """Formant synthesis: harmonics of the pitch weighted by three resonances, and bands of noise.

    Returns ((samples,) float64, (samples // CONTROL,) the place in SOUNDS of what is said).
    """
    segments = [("silence", *SILENCE, 0.08)]
    for word in words:
        for phoneme in WORDS[word].split():
            name = phoneme.rstrip("012")
            *sound, seconds = PHONEMES[name]
            segments.append((name, *sound, seconds * voice["pace"] * rng.uniform(0.8, 1.25)))
        segments.append(("silence", *SILENCE, rng.uniform(0.02, 0.09)))
    counts = [max(1, round(seconds * SAMPLE_RATE / CONTROL)) for *_, seconds in segments]
    sounds = np.repeat([SOUNDS.index(name) for name, *_ in segments], counts)
    formants = np.array([formants for _, formants, *_ in segments]) * rng.uniform(0.84, 1.16, (len(segments), 3))
    formants = np.repeat(formants * voice["throat"], counts, axis=0)
    voicing = np.repeat([voicing for _, _, voicing, *_ in segments], counts)
    smooth = np.hanning(13) / np.hanning(13).sum()  # 60 ms from one phoneme to the next
    formants = np.stack([np.convolve(np.pad(f, 6, mode="edge"), smooth, "valid") for f in formants.T], axis=1)
    voicing = np.convolve(np.pad(voicing, 6), smooth, "valid")

    frames = np.arange(len(voicing))
    at = np.arange(len(voicing) * CONTROL) / CONTROL
    pitch = voice["pitch"] * rng.uniform(0.93, 1.07)
    glide = (
        pitch * np.linspace(1.08, 0.92, len(at)) * (1 + 0.015 * np.sin(2 * np.pi * 4.5 * at * CONTROL / SAMPLE_RATE))
    )
    phase = 2 * np.pi * np.cumsum(glide) / SAMPLE_RATE
    audio, now, before, twice = np.zeros(len(at)), np.sin(phase), np.zeros(len(at)), 2 * np.cos(phase)
    for harmonic in range(1, int(4000 / pitch) + 1):
        distance = (harmonic * pitch - formants) / (0.5 * np.array([80, 110, 160]))
        resonance = (np.array([1, 0.6, 0.3]) / np.sqrt(1 + distance**2)).sum(axis=1)
        audio += np.interp(at, frames, voicing * resonance / harmonic ** voice["tilt"]) * now
        now, before = twice * now - before, now  # sin(k + 1)x = 2 cos x sin kx - sin(k - 1)x

    begin = 0
    for (_, _, _, band, _), count in zip(segments, counts):
        length = count * CONTROL
        if band:
            hiss = 0.8 * band_of_noise(length, *(edge * voice["throat"] for edge in band), rng)
            audio[begin : begin + length] += hiss * np.hanning(length)
        begin += length
    return audio / np.abs(audio).max(), sounds


def band_of_noise(length, low, high, rng):
    spectrum, pitch_of_bin = np.fft.rfft(rng.standard_normal(length)), np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    return np.fft.irfft(np.where((pitch_of_bin < low) | (pitch_of_bin > high), 0, spectrum), length)


def record(audio, room, decibels, rng):
    """(samples,) as a microphone in the room hears it, coloured noise being so many decibels below the speech."""
    size = 1 << (len(audio) + len(room)).bit_length()
    audio = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(room, size), size)[: len(audio)]
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    pitch_of_bin = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * np.maximum(pitch_of_bin, 50) ** -rng.uniform(0, 1), len(audio))
    audio = audio + noise * np.sqrt((audio**2).mean() / (noise**2).mean()) * 10 ** (-decibels / 20)
    return audio / np.abs(audio).max() * rng.uniform(0.3, 0.7)


# ---------------------------------------------------------------- the tiny teachers


def train_teachers(folder, seed=0, steps=(1600, 300, 300), utterances=1200):
    """Trains the three teachers on the training speakers' voices and writes each in its official form, in half precision.

    HuBERT's way (arXiv:2106.07447): masked frames, and the cluster of each frame to predict. HuBERT's come from k-means,
    and tell voices apart too; these are the synthesiser's own phonemes, each said by one of six groups of voices of like
    pitch. RobustHuBERT and WavLM carry on from HuBERT, on speech in louder noise and on speech with another speaker's
    mixed in, the targets being those of the clean speech.
    """
    voices, rooms, _ = cast("train-clean-100", *SPLITS["train-clean-100"][1:])
    rng = np.random.default_rng([seed, 100])
    speech = []
    for number in range(utterances):
        words, voice = [str(word) for word in rng.choice(list(WORDS), rng.integers(4, 9))], number % len(voices)
        audio, phonemes = say(words, voices[voice], rng)
        speech.append((audio, np.where(phonemes == 0, 0, phonemes + 12 * (voice * 6 // len(voices)))))

    os.makedirs(folder, exist_ok=True)
    first = None
    for (name, form), count, lr in zip(TEACHERS.items(), steps, (2e-3, 1e-3, 1e-3)):
        torch.manual_seed(seed)
        convolutions = ((48, 10, 5),) + ((48, 3, 2),) * 4 + ((48, 2, 2),) * 2
        config = EncoderConfig(convolutions, dim=64, ffn_dim=128, heads=4, layers=4, pos_kernel=32, pos_groups=4)
        if name == "wavlm":
            config.relative_buckets, config.relative_distance = 32, 128
        encoder = SpeechEncoder(config)
        if first:
            encoder.load_state_dict(first.state_dict(), strict=False)  # WavLM's relative positions are new
        predict_masked_clusters(encoder, name, speech, rooms, count, lr, np.random.default_rng([seed, 200]))
        first = first or encoder
        save_official(encoder, os.path.join(folder, f"{name}.pt"), form, torch.float16)


def predict_masked_clusters(encoder, name, speech, rooms, steps, lr, rng, batch_size=16):
    """HuBERT's pre-training, cross-entropy of masked and of other frames weighing the same (its alpha of 0.5)."""
    dim, masked, started = encoder.config.dim, None, time.monotonic()
    mask_embedding = torch.nn.Parameter(0.1 * torch.randn(dim))
    clusters = torch.nn.Linear(dim, 1 + 12 * 6)
    weights = [*encoder.parameters(), mask_embedding, *clusters.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    hide = encoder.feature_projection.register_forward_hook(
        lambda module, inputs, x: torch.where(masked[:, :, None], mask_embedding, x)
    )
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(10 * step / steps, (steps + 1 - step) / (0.9 * steps))
        waveforms, targets = draw(name, speech, rooms, batch_size, rng)
        begins = torch.from_numpy(rng.random(targets.shape) < 0.05).float()  # spans of 10 frames, as in HuBERT
        masked = F.max_pool1d(F.pad(begins[:, None], (9, 0)), 10, 1)[:, 0] > 0
        logits = clusters(encoder(waveforms, layers=[encoder.config.layers])[0])
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = 0.5 * losses[masked].mean() + 0.5 * losses[~masked].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            right = (logits.argmax(-1) == targets)[masked].float().mean()
            spent = f"{time.monotonic() - started:.0f} s"
            print(f"{name}: step {step}/{steps}  loss {loss:.3f}  masked frames right {right:.0%}  {spent}", flush=True)
    hide.remove()
    encoder.eval()


def draw(name, speech, rooms, batch_size, rng, samples=24080):
    """A batch of crops as the teacher hears them, (batch, samples), and the cluster of each frame, (batch, frames)."""
    middles = (np.arange((samples - 400) // 320 + 1) * 320 + 200) // CONTROL
    waveforms, targets = np.zeros((batch_size, samples), np.float32), np.zeros((batch_size, len(middles)), np.int64)
    for waveform, target in zip(waveforms, targets):
        audio, clusters = speech[rng.integers(len(speech))]
        begin = rng.integers(max(1, len(audio) - samples + 1)) // CONTROL
        audio, clusters = audio[begin * CONTROL :][:samples], clusters[begin:]
        quietest = 0 if name == "robust_hubert" else 5
        waveform[: len(audio)] = record(audio, rooms[rng.integers(len(rooms))], rng.uniform(quietest, 20), rng)
        if name == "wavlm" and rng.random() < 0.5:  # another speaker for up to half of the time
            other = speech[rng.integers(len(speech))][0][: rng.integers(samples // 10, samples // 2)]
            at = rng.integers(samples - len(other))
            waveform[at : at + len(other)] += rng.uniform(0.1, 0.5) * other
        inside = middles < len(clusters)
        target[inside] = clusters[middles[inside]]
    return torch.from_numpy(waveforms), torch.from_numpy(targets)


def main(arguments=None):
    parser = processes.parser("Train the demo's three teachers again, from nothing.")
    parser.add_argument("--teachers", required=True, metavar="DIR", help="folder that gets the three checkpoints")
    parser.add_argument("--seed", type=processes.seed, default=0, help="of the speech, the first weights and the masks")
    args = parser.parse_args(arguments)
    processes.device()
    with processes.together():
        train_teachers(args.teachers, args.seed)
    print(f"{args.teachers}: {', '.join(f'{name}.pt' for name in TEACHERS)}")


if __name__ == "__main__":
    processes.run(main)
