"""All that --demo makes: synthetic speech, three tiny random teachers, a student, and tables for speakers and emotions.

README's promise kept here: the demo needs no download, and writes in data/demo and runs/demo-avg alone.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import soundfile
import torch

from data import SAMPLE_RATE, files_under, read_audio
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from safe_files import locked, write_text

DATA = "data/demo"
STUDENT = "runs/demo-avg/student.pt"
SPEAKERS = f"{DATA}/speakers.csv"
EMOTIONS = f"{DATA}/emotion/emotions.csv"
TEACHERS = {"hubert": "fairseq", "robust_hubert": "s3prl", "wavlm": "microsoft"}  # and the form each is written in


# ---------------------------------------------------------------- what train.py --demo needs


def teachers():
    """The teachers' paths, as --teachers takes them."""
    return ",".join(f"{DATA}/teachers/{name}.pt" for name in TEACHERS)


def prepare(folder=DATA):
    """The synthetic corpus and three tiny random teachers, written once, by one process a machine."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    with locked(folder + ".lock"):
        if os.path.isdir(folder):
            return check(folder)
        shutil.rmtree(folder + ".partial", ignore_errors=True)
        write_corpus(folder + ".partial")
        os.makedirs(f"{folder}.partial/teachers")
        convolutions = ((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2
        for seed, (name, form) in enumerate(TEACHERS.items()):
            torch.manual_seed(seed)
            buckets = 320 if form == "microsoft" else 0
            encoder = SpeechEncoder(EncoderConfig(convolutions, dim=64, ffn_dim=128, heads=4, relative_buckets=buckets))
            for parameter in encoder.layers.parameters():
                if parameter.dim() == 2:  # wide enough for layers to differ from each other
                    torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
            save_official(encoder, f"{folder}.partial/teachers/{name}.pt", form)
        os.rename(folder + ".partial", folder)


def check(folder=DATA):
    """Raises ValueError where the folder is not a whole demo."""
    needed = [f"teachers/{name}.pt" for name in TEACHERS] + ["lexicon.txt"]
    missing = [name for name in needed if not os.path.isfile(os.path.join(folder, name))]
    for split, (utterances, _) in SPLITS.items():
        found = sum(path.endswith(".flac") for path in files_under(folder, split))
        missing += [f"{utterances - found} of {utterances} files of {split}"] if found < utterances else []
    if missing:
        raise ValueError(
            f"{folder}: not a whole demo, {', '.join(missing)} missing; delete it, and --demo makes it again"
        )


# ---------------------------------------------------------------- what evaluate_*.py --demo needs


def student():
    """The demo's corpus and student, made by train.py where they are not there yet."""
    if os.path.isdir(DATA):
        check()
    if not (os.path.exists(STUDENT) and os.path.isdir(DATA)):
        print(f"demo: there is no {STUDENT} yet; python train.py --demo makes it", flush=True)
        train = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        done = subprocess.run([sys.executable, train, "--demo", "--out", os.path.dirname(STUDENT)])
        if done.returncode:
            sys.exit(done.returncode)
    print(
        "demo: synthetic speech, a student of random teachers. It shows the machinery, not the quality of the method."
    )


def speakers(path=SPEAKERS):
    """A table of the six training speakers for evaluate_sid.py, each one's utterances dealt to train, dev and test."""
    root, folder = os.path.dirname(path), "train-clean-100"
    lines = ["path,label,split\n"]
    for speaker in sorted(os.listdir(os.path.join(root, folder))):
        place = f"{folder}/{speaker}/1"
        files = sorted(name for name in os.listdir(os.path.join(root, place)) if name.endswith(".flac"))
        splits = ["test", "dev", "train", "train", "train"]
        lines += [f"{place}/{name},{speaker},{splits[number % 5]}\n" for number, name in enumerate(files)]
    write_text(path, "".join(lines))


def emotions(path=EMOTIONS):
    """A table for evaluate_er.py of four ways to say the demo's sentences, a fold a speaker, made once.

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
    for speaker in sorted(os.listdir(source))[:5]:
        names = sorted(name for name in os.listdir(f"{source}/{speaker}/1") if name.endswith(".flac"))
        for number, name in enumerate(names[:20]):
            audio = read_audio(f"{source}/{speaker}/1/{name}").numpy()
            label, way = list(ways.items())[number % 4]
            soundfile.write(os.path.join(folder, name), way(audio, np.arange(len(audio))), SAMPLE_RATE)
            lines.append(f"{name},{label},{speaker}\n")
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
WORDS = {
    "SEE": "S IY1", "SHE": "SH IY1", "FEE": "F IY1", "KNEE": "N IY1", "ME": "M IY1", "ZOO": "Z UW1", "SHOE": "SH UW1",
    "LOW": "L OW1", "NO": "N OW1", "SHOW": "SH OW1", "SO": "S OW1", "MOON": "M UW1 N", "NOON": "N UW1 N",
    "SOON": "S UW1 N", "FOOL": "F UW1 L", "LESS": "L EH1 S", "MESS": "M EH1 S", "SHELL": "SH EH1 L", "FELL": "F EH1 L",
    "SEAL": "S IY1 L", "MEAL": "M IY1 L", "FOAM": "F OW1 M", "LOAN": "L OW1 N", "NOSE": "N OW1 Z", "MA": "M AA1",
    "LA": "L AA1", "SHAH": "SH AA1",
}  # fmt: skip
SPLITS = {"train-clean-100": (132, 6), "dev-clean": (16, 2), "test-clean": (16, 2)}  # utterances, speakers


def write_corpus(folder, seed=0):
    """Writes about 5 minutes of formant-synthesised words in LibriSpeech's layout; the same bytes for the same seed.

    folder gets {train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/*.flac with .trans.txt, and lexicon.txt
    (WORD<tab>PHONEMES, ARPAbet with stress). No speaker is in two splits.
    """
    rng = np.random.default_rng(seed)
    speaker = 100
    for split, (utterances, speakers) in SPLITS.items():
        for pitch in np.linspace(90, 230, speakers):
            speaker += 1
            throat = 0.85 + 0.3 * pitch / 230 + rng.uniform(-0.03, 0.03)  # higher voices have higher formants
            place = os.path.join(folder, split, str(speaker), "1")
            os.makedirs(place, exist_ok=True)
            lines = []
            for number in range(utterances // speakers):
                words = [str(word) for word in rng.choice(list(WORDS), rng.integers(3, 8))]
                name = f"{speaker}-1-{number:04d}"
                audio = _say(words, pitch * rng.uniform(0.93, 1.07), throat, rng)
                soundfile.write(os.path.join(place, name + ".flac"), audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {' '.join(words)}\n")
            with open(os.path.join(place, f"{speaker}-1.trans.txt"), "w", encoding="utf-8") as file:
                file.writelines(lines)
    with open(os.path.join(folder, "lexicon.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{word}\t{phonemes}\n" for word, phonemes in sorted(WORDS.items()))


def _say(words, pitch, throat, rng):
    """Formant synthesis: harmonics of the pitch weighted by three resonances, and bands of noise. (samples,) int16."""
    silence = ((500, 1500, 2500), 0.0, None)
    segments = [(*silence, 0.08)]
    for word in words:
        for phoneme in WORDS[word].split():
            *sound, seconds = PHONEMES[phoneme.rstrip("012")]
            segments.append((*sound, seconds * rng.uniform(0.8, 1.25)))
        segments.append((*silence, rng.uniform(0.02, 0.09)))

    control = 200  # the resonances move at 200 Hz
    counts = [max(1, round(seconds * control)) for *_, seconds in segments]
    formants = np.repeat(np.array([f for f, *_ in segments], float) * throat, counts, axis=0)
    voicing = np.repeat([v for _, v, *_ in segments], counts)
    smooth = np.hanning(9) / np.hanning(9).sum()  # 40 ms from one phoneme to the next
    formants = np.stack([np.convolve(np.pad(f, 4, mode="edge"), smooth, "valid") for f in formants.T], axis=1)
    voicing = np.convolve(np.pad(voicing, 4), smooth, "valid")

    step = SAMPLE_RATE // control
    at = np.arange(len(voicing) * step) / step
    frames = np.arange(len(voicing))
    glide = pitch * np.linspace(1.08, 0.92, len(at)) * (1 + 0.015 * np.sin(2 * np.pi * 4.5 * at / control))
    phase = 2 * np.pi * np.cumsum(glide) / SAMPLE_RATE
    audio, now, before, twice = np.zeros(len(at)), np.sin(phase), np.zeros(len(at)), 2 * np.cos(phase)
    for harmonic in range(1, int(4000 / pitch) + 1):
        distance = (harmonic * pitch - formants) / (0.5 * np.array([80, 110, 160]))
        loudness = voicing * (np.array([1, 0.6, 0.3]) / np.sqrt(1 + distance**2)).sum(axis=1) / harmonic**0.5
        audio += np.interp(at, frames, loudness) * now
        now, before = twice * now - before, now  # sin(k + 1)x = 2 cos x sin kx - sin(k - 1)x

    begin = 0
    for (_, _, band, _), count in zip(segments, counts):
        length = count * step
        if band:
            spectrum = np.fft.rfft(rng.standard_normal(length))
            pitch_of_bin = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
            spectrum[(pitch_of_bin < band[0]) | (pitch_of_bin > band[1])] = 0
            audio[begin : begin + length] += 0.8 * np.fft.irfft(spectrum, length) * np.hanning(length)
        begin += length
    audio = audio / np.abs(audio).max() * rng.uniform(0.3, 0.7) + 0.001 * rng.standard_normal(len(audio))
    return (audio * 32767).astype(np.int16)
