"""What --demo needs: synthetic speech, tables of speakers and emotions, and a comparison.

The demo needs no download, and writes only to data/demo, data/demo.lock and runs/demo-AGG.
"""

import argparse
import collections
import glob
import os
import shutil

import numpy as np
import soundfile
from filelock import FileLock

import checkpoint
import program
from data import SAMPLE_RATE, read_audio

DATA = "data/demo"
RUN = "runs/demo-avg"
HERE = os.path.dirname(os.path.abspath(__file__))
TEACHERS = [os.path.join(HERE, f"{name}.pt") for name in ("hubert", "robust_hubert", "wavlm")]
SPLITS = {  # utterances, speakers, rooms
    "train-clean-100": (240, 24, 8),
    "dev-clean": (32, 8, 3),
    "test-clean": (64, 16, 4),
}
TABLES = {"sid": f"{DATA}/speakers.csv", "er": f"{DATA}/emotion/emotions.csv"}
SETTINGS = {  # of the evaluations with --demo
    "pr": {"data": DATA, "lexicon": f"{DATA}/lexicon.txt", "steps": 1200, "eval_every": 300},
    "asr": {"data": DATA, "hidden": 64, "steps": 600, "eval_every": 150},
    "sid": {"manifest": TABLES["sid"], "steps": 1500, "eval_every": 250},
    "er": {"manifest": TABLES["er"], "lr": "1e-2", "steps": 600, "eval_every": 100},
}
ROWS = {  # of the comparison: folder and name, as in rows.tsv
    "first-teacher": "first teacher",
    "student": "student",
    "before-distillation": "before distillation",
    "filter-banks": "filter banks",
}


# ------------------------------------------------------------------ what --demo needs


def prepare():
    """Writes the corpus and the tables of the tasks, unless they are there."""
    os.makedirs(os.path.dirname(DATA), exist_ok=True)
    with FileLock(f"{DATA}.lock"):
        if os.path.isdir(DATA):
            return
        shutil.rmtree(f"{DATA}.partial", ignore_errors=True)
        write_corpus(f"{DATA}.partial")
        write_tables(f"{DATA}.partial")
        os.rename(f"{DATA}.partial", DATA)


def train_student(folder, *flags):
    """Path of FOLDER/student.pt; if it is missing or unfinished, train.py --demo is run first."""
    import train  # not above: train.py imports this file

    student = f"{folder}/student.pt"
    with program.one_line_errors():
        settings = checkpoint.read_json(f"{folder}/config.json").get("settings", {})
        finished = os.path.exists(student) and checkpoint.load(student)["step"] == settings["steps"]
    if not finished:
        print(f"demo: {student} is not finished, running train.py --demo", flush=True)
        train.main(["--demo", "--out", folder, *flags])
    return student


def compare(evaluate, args):
    """Evaluates four upstreams by a task's evaluate(args), and prints superb.report's table."""
    from superb import report

    folder = args.out or RUN
    lines = [f"{row}\t\t{name}\n" for row, name in ROWS.items()]
    with program.one_line_errors():
        os.makedirs(folder, exist_ok=True)
        checkpoint.save(f"{folder}/rows.tsv", "".join(lines))
    before = train_student(f"{RUN}/before-distillation", "--steps", "0")
    upstreams = [TEACHERS[0], train_student(RUN), before, "fbank"]
    for row, upstream in zip(ROWS, upstreams):
        print(f"\n{ROWS[row]}", flush=True)
        settings = vars(args) | {"upstream": upstream, "out": f"{folder}/{row}/{args.task}"}
        evaluate(argparse.Namespace(**settings))
    print()
    report.main([f"{folder}/{row}/{args.task}" for row in ROWS])


def write_tables(folder):
    """Writes speakers.csv for superb/sid.py, and emotion/, a table with audio, for superb/er.py.

    Speakers: per training speaker, utterances of all three splits. Emotions: five folds of two
    speakers; a sentence as it is, fast and high, slow and soft, or loud and distorted.
    """
    splits = ["test", "dev", "train", "train", "train"]
    labels = ["neutral", "happy", "sad", "angry"]
    speakers, emotions = ["path,label,split\n"], ["path,label,fold\n"]
    os.makedirs(f"{folder}/emotion", exist_ok=True)
    for path in sorted(glob.glob("train-clean-100/*/1/*.flac", root_dir=folder)):
        name = os.path.basename(path)
        speaker, _, number = name.removesuffix(".flac").split("-")
        speakers.append(f"{path},{speaker},{splits[int(number) % 5]}\n")
        index = int(speaker) - 101
        if index < 10:
            label = labels[(int(number) + index // 5 * 2) % 4]
            waveform = express(read_audio(f"{folder}/{path}").numpy(), label)
            soundfile.write(f"{folder}/emotion/{name}", waveform, SAMPLE_RATE)
            emotions.append(f"{name},{label},{index % 5}\n")
    checkpoint.save(f"{folder}/speakers.csv", "".join(speakers))
    checkpoint.save(f"{folder}/emotion/emotions.csv", "".join(emotions))


def express(audio, emotion):
    """(samples,) changed by an emotion."""
    time = np.arange(len(audio))
    if emotion == "happy":
        return np.interp(time * 1.25, time, audio)[: int(len(audio) / 1.25)]
    if emotion == "sad":
        return 0.3 * np.interp(np.arange(int(len(audio) / 0.85)) * 0.85, time, audio)
    if emotion == "angry":
        return np.clip(6 * audio, -0.9, 0.9)
    return audio


# ------------------------------------------------------------------ the synthetic speech

# Formants in Hz, voicing from 0 to 1, noise band in Hz or None, seconds.
Sound = collections.namedtuple("Sound", "formants voicing band seconds")
SOUNDS = {  # silence, and phonemes in ARPAbet
    "silence": Sound((500, 1500, 2500), 0.0, None, 0.08),
    "AA": Sound((730, 1090, 2440), 1.0, None, 0.16),
    "IY": Sound((270, 2290, 3010), 1.0, None, 0.15),
    "UW": Sound((300, 870, 2240), 1.0, None, 0.15),
    "EH": Sound((530, 1840, 2480), 1.0, None, 0.14),
    "OW": Sound((500, 900, 2400), 1.0, None, 0.16),
    "M": Sound((250, 1100, 2100), 0.5, None, 0.08),
    "N": Sound((250, 1500, 2400), 0.5, None, 0.08),
    "L": Sound((360, 1000, 2700), 0.7, None, 0.08),
    "S": Sound((300, 1600, 2600), 0.0, (4500, 7500), 0.11),
    "SH": Sound((300, 1700, 2400), 0.0, (2200, 5000), 0.11),
    "F": Sound((300, 1200, 2300), 0.0, (1200, 7000), 0.09),
    "Z": Sound((300, 1600, 2600), 0.4, (4500, 7500), 0.09),
}
LEXICON = """
    SEE S IY1, SHE SH IY1, FEE F IY1, KNEE N IY1, ME M IY1, ZOO Z UW1, SHOE SH UW1, LOW L OW1,
    NO N OW1, SHOW SH OW1, SO S OW1, MOON M UW1 N, NOON N UW1 N, SOON S UW1 N, FOOL F UW1 L,
    LESS L EH1 S, MESS M EH1 S, SHELL SH EH1 L, FELL F EH1 L, SEAL S IY1 L, MEAL M IY1 L,
    FOAM F OW1 M, LOAN L OW1 N, NOSE N OW1 Z, MA M AA1, LA L AA1, SHAH SH AA1
"""
WORDS = dict(entry.split(maxsplit=1) for entry in LEXICON.strip().split(","))
# Pitch in Hz, factors of formants and durations, decay exponent over harmonics.
Voice = collections.namedtuple("Voice", "pitch formants pace tilt")
HOP = 80  # samples per control point of the synthesis: 200 points per second


def write_corpus(folder, seed=0, splits=SPLITS, decibels=(5, 20)):
    """Writes synthetic speech in LibriSpeech's layout: the same bytes for the same seed.

    folder gets SPLIT/SPEAKER/1/*.flac with .trans.txt, and lexicon.txt.
    splits: {name: (utterances, speakers, rooms)}, by default ten minutes; no two splits share a
        speaker or a room.
    decibels: range of the signal-to-noise ratio.
    """
    speaker = 100
    for split, (utterances, *sizes) in splits.items():
        voices, rooms, rng = make_voices(split, *sizes, seed)
        for voice in voices:
            speaker += 1
            chapter = f"{folder}/{split}/{speaker}/1"
            os.makedirs(chapter, exist_ok=True)
            lines = []
            for number in range(utterances // len(voices)):
                name = f"{speaker}-1-{number:04d}"
                words = sample_words(rng, 3, 8)
                audio, _ = synthesise(words, voice, rng)
                room = rooms[rng.integers(len(rooms))]
                audio = add_room_and_noise(audio, room, rng.uniform(*decibels), rng)
                audio = (audio * 32767).astype(np.int16)
                soundfile.write(f"{chapter}/{name}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {' '.join(words)}\n")
            checkpoint.save(f"{chapter}/{speaker}-1.trans.txt", "".join(lines))
    lines = [f"{word}\t{phonemes}\n" for word, phonemes in sorted(WORDS.items())]
    checkpoint.save(f"{folder}/lexicon.txt", "".join(lines))


def sample_words(rng, low, high):
    """From `low` to `high` - 1 random words."""
    return [str(word) for word in rng.choice(list(WORDS), rng.integers(low, high))]


def make_voices(split, speakers, rooms, seed=0):
    """(voices, impulse responses of rooms, random generator) of a split."""
    rng = np.random.default_rng([seed, *split.encode()])
    voices = []
    for pitch in np.geomspace(85, 250, speakers) * rng.uniform(0.97, 1.03, speakers):
        formants = 0.85 + 0.3 * pitch / 230 + rng.uniform(-0.1, 0.1)
        voices.append(Voice(pitch, formants, rng.uniform(0.75, 1.2), rng.uniform(0.3, 0.8)))
    responses = []
    for seconds in rng.uniform(0.15, 0.5, rooms):  # reverberation time, to -60 dB
        length = int(seconds * SAMPLE_RATE)
        echo = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
        echo[:48] = 0  # the nearest wall is half a metre away
        echo *= rng.uniform(0.2, 0.6) / np.sqrt((echo**2).sum())
        responses.append(np.concatenate([[1.0], echo[1:]]))
    return voices, responses, rng


def synthesise(words, voice, rng):
    """Formant synthesis: harmonics of the pitch under three resonances, and bands of noise.

    Returns (samples,) float64, and (samples // HOP,) indices of SOUNDS.
    """
    names, seconds = ["silence"], [SOUNDS["silence"].seconds]
    for word in words:
        for phoneme in WORDS[word].split():
            names.append(phoneme.rstrip("012"))
            seconds.append(SOUNDS[names[-1]].seconds * voice.pace * rng.uniform(0.8, 1.25))
        names.append("silence")
        seconds.append(rng.uniform(0.02, 0.09))
    counts = [max(1, round(length * SAMPLE_RATE / HOP)) for length in seconds]
    sounds = np.repeat([list(SOUNDS).index(name) for name in names], counts)
    formants = np.array([SOUNDS[name].formants for name in names])
    formants = formants * rng.uniform(0.84, 1.16, (len(names), 3)) * voice.formants
    formants = np.repeat(formants, counts, axis=0)
    voicing = np.repeat([SOUNDS[name].voicing for name in names], counts)
    window = np.hanning(13) / np.hanning(13).sum()  # 60 ms from one phoneme to the next
    formants = np.pad(formants, ((6, 6), (0, 0)), mode="edge")
    formants = np.stack([np.convolve(f, window, "valid") for f in formants.T], axis=1)
    voicing = np.convolve(np.pad(voicing, 6), window, "valid")

    points = np.arange(len(voicing))
    time = np.arange(len(voicing) * HOP) / HOP
    pitch = voice.pitch * rng.uniform(0.93, 1.07)
    vibrato = 1 + 0.015 * np.sin(2 * np.pi * 4.5 * time * HOP / SAMPLE_RATE)
    glide = pitch * np.linspace(1.08, 0.92, len(time)) * vibrato
    phase = 2 * np.pi * np.cumsum(glide) / SAMPLE_RATE
    wave, before, audio = np.sin(phase), np.zeros(len(time)), np.zeros(len(time))
    for harmonic in range(1, int(4000 / pitch) + 1):
        distance = (harmonic * pitch - formants) / np.array([40, 55, 80])  # half bandwidths in Hz
        resonance = (np.array([1, 0.6, 0.3]) / np.sqrt(1 + distance**2)).sum(axis=1)
        amplitude = voicing * resonance / harmonic**voice.tilt
        audio += np.interp(time, points, amplitude) * wave
        # sin (k + 1)x = 2 cos x sin kx - sin (k - 1)x
        wave, before = 2 * np.cos(phase) * wave - before, wave

    for name, count, end in zip(names, counts, np.cumsum(counts)):
        if SOUNDS[name].band:
            low, high = SOUNDS[name].band
            length = count * HOP
            hiss = band_of_noise(length, low * voice.formants, high * voice.formants, rng)
            audio[(end - count) * HOP : end * HOP] += 0.8 * hiss * np.hanning(length)
    return audio / np.abs(audio).max(), sounds


def band_of_noise(length, low, high, rng):
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    outside = (frequencies < low) | (frequencies > high)
    return np.fft.irfft(np.where(outside, 0, spectrum), length)


def add_room_and_noise(audio, room, decibels, rng):
    """(samples,) in a room, with coloured noise `decibels` below the speech."""
    size = 1 << (len(audio) + len(room)).bit_length()
    audio = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(room, size), size)[: len(audio)]
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    frequencies = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    color = np.maximum(frequencies, 50) ** -rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum * color, len(audio))
    level = np.sqrt((audio**2).mean() / (noise**2).mean())
    audio = audio + noise * level * 10 ** (-decibels / 20)
    return audio / np.abs(audio).max() * rng.uniform(0.3, 0.7)
