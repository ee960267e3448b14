"""The demo's data, without a download: synthetic speech, tables of speakers and emotions, noise."""

import collections
import os
import shutil

import numpy as np
import soundfile
from filelock import FileLock

import checkpoint
import program
from data import SAMPLE_RATE, read_audio

DATA = "data/demo"
SPLITS = {  # utterances, speakers, rooms; the last one is for identifying speakers and emotions
    "train-clean-100": (960, 24, 8),
    "dev-clean": (64, 8, 3),
    "test-clean": (512, 16, 4),
    "speakers": (2160, 24, 6),
}
EMOTIONS = ["neutral", "happy", "sad", "angry"]


def prepare():
    """Writes data/demo, unless it exists: all of it, or nothing if interrupted."""
    os.makedirs(os.path.dirname(DATA), exist_ok=True)
    with FileLock(f"{DATA}.lock"):
        if os.path.isdir(DATA):
            return
        print(f"{DATA}: writing synthetic speech, for half a minute", flush=True)
        shutil.rmtree(f"{DATA}.partial", ignore_errors=True)
        write_corpus(f"{DATA}.partial")
        write_tables(f"{DATA}.partial")
        write_noise(f"{DATA}.partial")
        os.rename(f"{DATA}.partial", DATA)


def write_tables(folder, split="speakers"):
    """Writes speakers.csv for superb/sid.py, and emotion/, a table with audio, for superb/er.py.

    Speakers: of the utterances per speaker, half for the test, one tenth for dev.
    Emotions: up to 20 speakers in five folds; a sentence is unchanged, fast and high, slow and
    soft, or loud and distorted.
    """
    parts = ["test", "dev", *["test", "train"] * 4]
    speakers, emotions = ["path,label,split\n"], ["path,label,fold\n"]
    os.makedirs(f"{folder}/emotion", exist_ok=True)
    for index, speaker in enumerate(sorted(os.listdir(f"{folder}/{split}"))):
        chapter = f"{split}/{speaker}/1"
        names = [name for name in os.listdir(f"{folder}/{chapter}") if name.endswith(".flac")]
        for number, name in enumerate(sorted(names)):
            speakers.append(f"{chapter}/{name},{speaker},{parts[number % 10]}\n")
            if index < 20 and number < 56:
                emotion = EMOTIONS[number % 4]
                waveform = express(read_audio(f"{folder}/{chapter}/{name}").numpy(), emotion)
                soundfile.write(f"{folder}/emotion/{name}", waveform, SAMPLE_RATE)
                emotions.append(f"{name},{emotion},{index % 5}\n")
    checkpoint.save(f"{folder}/speakers.csv", "".join(speakers))
    checkpoint.save(f"{folder}/emotion/emotions.csv", "".join(emotions))


def write_noise(folder, files=16, seconds=8):
    """Writes coloured noise: noise/ for the evaluations, and noise-train/ for distillation."""
    for number, name in enumerate(["noise", "noise-train"]):
        rng = np.random.default_rng([number, *b"noise"])
        os.makedirs(f"{folder}/{name}")
        for file in range(files):
            noise = coloured_noise(seconds * SAMPLE_RATE, rng)
            noise *= 0.5 / np.abs(noise).max()
            soundfile.write(f"{folder}/{name}/{file:02d}.flac", noise, SAMPLE_RATE)


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


def write_corpus(folder, seed=0, splits=SPLITS, decibels=(10, 30)):
    """Writes synthetic speech in LibriSpeech's layout: the same bytes for the same seed.

    folder gets SPLIT/SPEAKER/1/*.flac with .trans.txt, and lexicon.txt.
    splits: {name: (utterances, speakers, rooms)}; no two splits share a speaker or a room.
    decibels: range of the signal-to-noise ratio.
    """
    speaker, written = 100, 0
    progress = program.Progress("utterances", sum(sizes[0] for sizes in splits.values()))
    for split, (utterances, *sizes) in splits.items():
        voices, rooms, rng = make_voices(split, *sizes, seed)
        for voice in voices:
            speaker += 1
            chapter = f"{folder}/{split}/{speaker}/1"
            os.makedirs(chapter, exist_ok=True)
            lines = []
            for number in range(utterances // len(voices)):
                name = f"{speaker}-1-{number:04d}"
                words = sample_words(rng, *((2, 5) if split == "speakers" else (3, 8)))
                audio, _ = synthesise(words, voice, rng)
                room = rooms[rng.integers(len(rooms))]
                audio = add_room_and_noise(audio, room, rng.uniform(*decibels), rng)
                audio = (audio * 32767).astype(np.int16)
                soundfile.write(f"{chapter}/{name}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {' '.join(words)}\n")
                written += 1
                progress.show(written)
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
    twice_cosine = 2 * np.cos(phase)
    for harmonic in range(1, int(4000 / pitch) + 1):
        distance = (harmonic * pitch - formants) / np.array([40, 55, 80])  # half bandwidths in Hz
        resonance = (np.array([1, 0.6, 0.3]) / np.sqrt(1 + distance**2)).sum(axis=1)
        amplitude = voicing * resonance / harmonic**voice.tilt
        audio += np.interp(time, points, amplitude) * wave
        # sin (k + 1)x = 2 cos x sin kx - sin (k - 1)x
        wave, before = twice_cosine * wave - before, wave

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
    noise = coloured_noise(len(audio), rng)
    level = np.sqrt((audio**2).mean() / (noise**2).mean())
    audio = audio + noise * level * 10 ** (-decibels / 20)
    return audio / np.abs(audio).max() * rng.uniform(0.3, 0.7)


def coloured_noise(samples, rng):
    """(samples,) between white noise, and noise whose amplitude is inverse to the frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * np.maximum(frequencies, 50) ** -rng.uniform(0, 1), samples)
