"""data.py: reading audio, batches, noise."""

import random
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import flags, on_cpu, shared, write_audio

import data
import manifest
import train
from data import TrainBatches, load_batches, read_audio
from manifest import Corpus, find_corpus

LENGTHS = [400, 1000, 3199, 3200, 5000, 9600, 16000, 16001, 20000, 24000, 30000, 40000] * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    write_audio(folder, LENGTHS)
    return find_corpus(folder, ["."])


# ------------------------------------------------------------------ reading


CASES = [(8000, "flac"), (11025, "flac"), (22050, "flac"), (44100, "flac"), (48000, "flac")]
CASES += [(44100, "mp3"), (44100, "ogg"), (16000, "mp3"), (192000, "wav")]


@pytest.mark.parametrize("rate, form", CASES)
def test_a_piece_is_that_of_the_whole_file_and_only_the_piece_is_read(
    tmp_path, monkeypatch, rate, form
):
    (path,) = write_audio(tmp_path, [6 * rate], rate=rate, suffix=f".{form}")
    stereo, _ = soundfile.read(path)
    soundfile.write(path, np.stack([stereo, -0.5 * stereo], 1), rate)
    whole, _ = soundfile.read(path, dtype="float32")
    expected = torch.from_numpy(whole.mean(axis=1))
    if rate != 16000:
        expected = torchaudio.functional.resample(expected, rate, 16000)
    assert torch.equal(read_audio(path), expected)
    read = soundfile.SoundFile.read
    sizes = []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **k: sizes.append(n) or read(self, n, **k)
    )
    for start, samples in [(0, 16000), (12345, 8000), (len(expected) - 4001, 4001)]:
        piece = read_audio(path, start, samples)
        assert (piece - expected[start : start + samples]).abs().max() < 1e-5, (start, samples)
    assert max(sizes) < 1.3 * rate + 12 * rate


@pytest.mark.parametrize("name", ["test/0044/1/0044-1-000440082", "train/0048/1/0048-1-000480119"])
def test_pieces_of_an_mp3_do_not_miss_what_earlier_frames_hold(tmp_path, name):
    speech, _ = soundfile.read(shared(f"speech/ocean/{name}.ogg"), dtype="float32")
    soundfile.write(tmp_path / "speech.mp3", speech, 16000)
    whole = read_audio(tmp_path / "speech.mp3")
    for start in range(2, len(whole) - 8000, 500):
        piece = read_audio(tmp_path / "speech.mp3", start, 8000)
        assert (piece - whole[start : start + 8000]).abs().max() < 1e-5


def test_a_resampled_file_has_the_length_that_its_header_promises(tmp_path):
    # 441,328 samples at 44.1 kHz are 160,119.002: torchaudio alone returns 160,119.
    for rate, frames in [(8000, 1000), (22050, 1337), (44100, 1001), (44100, 441328), (48000, 3)]:
        samples = data.resampled_length(frames, rate)
        assert samples == -(-frames * 16000 // rate)
        (path,) = write_audio(tmp_path, [frames], rate)
        assert len(read_audio(path, file_samples=samples)) == samples
        assert len(read_audio(path, samples - 1, 1)) == 1


@pytest.mark.parametrize("damage", ["truncated", "replaced", "nan", "odd rate"])
def test_damaged_audio_raises_an_error_with_the_cause(tmp_path, damage):
    (path,) = write_audio(tmp_path, [9000], suffix=".wav")
    if damage == "truncated":
        (path,) = write_audio(tmp_path, [90000])
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "nan":
        soundfile.write(path, np.full(9000, np.nan), 16000, subtype="FLOAT")
    elif damage == "odd rate":
        soundfile.write(path, np.zeros(9000), 15999)
    causes = {
        "truncated": "^cannot be decoded",
        "replaced": "has 9000 samples at 16 kHz, expected 8000",
        "nan": "not finite",
    }
    causes["odd rate"] = "15999 Hz"
    with pytest.raises(ValueError, match=causes[damage]):
        read_audio(path, file_samples=8000 if damage == "replaced" else None)


# ------------------------------------------------------------------ batches


def test_every_step_has_crops_of_one_length_of_utterances_of_similar_length(corpus):
    batches = TrainBatches(corpus, 6)
    for epoch in range(3):
        utterances, crops, _ = batches.plan(epoch)
        assert sorted(utterances.flatten().tolist()) == list(range(36))
        lengths = corpus.samples[utterances]
        assert (crops <= lengths.min(axis=1)).all()
        assert crops.sum() * 6 > 0.6 * corpus.samples.sum()
    first, second = (batches.plan(epoch)[0] for epoch in (0, 1))
    assert not np.array_equal(first, second)
    for step in range(6):
        item = batches[step]
        assert item["waveforms"].shape == (6, batches.plan(0)[1][step])
        assert item["skipped"] == {"audio": {}, "noise": {}}


def test_an_epoch_is_planned_once_so_that_workers_share_the_plan_made_before_them(
    corpus, monkeypatch
):
    expected = TrainBatches(corpus, 6)[8]["paths"]
    batches = TrainBatches(corpus, 6)
    batches.plan(1)
    monkeypatch.setattr(np.random, "default_rng", None)
    assert batches[8]["paths"] == expected


def test_the_number_of_ranks_and_of_workers_changes_no_batch(corpus):
    alone = [TrainBatches(corpus, 6, seed=3)[step] for step in range(4, 9)]
    shares = [TrainBatches(corpus, 6, 3, rank, 3) for rank in range(3)]
    loaders = [load_batches(share, range(4, 9), workers=rank) for rank, share in enumerate(shares)]
    for whole, *parts in zip(alone, *loaders):
        assert torch.equal(whole["waveforms"], torch.cat([part["waveforms"] for part in parts]))
        assert whole["paths"] == sum((part["paths"] for part in parts), [])


class Stuck(torch.utils.data.Dataset):
    def __getitem__(self, step):
        time.sleep(60)


def test_batches_that_do_not_arrive_are_an_error(monkeypatch):
    monkeypatch.setattr(data, "BATCH_TIMEOUT", 5)
    with pytest.raises(RuntimeError, match="no batch for 5 s: a stuck disk"):
        next(load_batches(Stuck(), range(2), workers=1))


def test_an_unreadable_utterance_is_replaced_by_the_next_of_its_batch(tmp_path):
    paths = write_audio(tmp_path, [6000] * 8)
    found = find_corpus(tmp_path, ["."])
    whole = TrainBatches(found, 8)[0]
    paths[1].unlink()
    soundfile.write(paths[2], np.zeros(6400), 16000)
    batches = [TrainBatches(found, 8)[0]]
    batches.append([TrainBatches(found, 8, 0, rank, 8)[0] for rank in range(8)])
    alone, shares = batches
    assert set(alone["skipped"]["audio"]) == {"001.flac", "002.flac"}
    assert "6400 samples at 16 kHz, expected 6000" in alone["skipped"]["audio"]["002.flac"]
    by_path = dict(zip(whole["paths"], whole["waveforms"]))
    assert all(map(torch.equal, alone["waveforms"], (by_path[path] for path in alone["paths"])))
    assert torch.equal(alone["waveforms"], torch.cat([share["waveforms"] for share in shares]))
    last = tmp_path / alone["paths"][0]
    for path in set(paths) - {last}:
        path.unlink(missing_ok=True)
    assert TrainBatches(found, 8)[0]["paths"] == [last.name] * 8
    last.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: no utterance is readable"):
        TrainBatches(found, 8)[0]


def test_a_batch_larger_than_the_corpus_is_refused(corpus):
    with pytest.raises(ValueError, match="37 .* 36"):
        TrainBatches(corpus, 37)


def test_too_little_shared_memory_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 3, 64e6))
    data.check_shared_memory(24e6, workers=0)
    data.check_shared_memory(24e6, workers=1)
    with pytest.raises(ValueError, match="4 workers need 192 MB .*, 64 MB are free.*--shm-size"):
        data.check_shared_memory(24e6, workers=4)


# ------------------------------------------------------------------ damaged files


MUTATIONS = ["truncated", "flipped", "header", "empty", "nan", "infinite", "8 channels", "192 kHz"]


def mutate(path, how, rng):
    """Writes a broken or unusual file."""
    noise = np.random.default_rng(rng.randrange(10**9))
    sound = 0.1 * noise.standard_normal(rng.randrange(500, 6000))
    if how in ("nan", "infinite"):
        path = path.with_suffix(".wav")
        sound[rng.randrange(len(sound))] = np.nan if how == "nan" else np.inf
        soundfile.write(path, sound, 16000, subtype="FLOAT")
    elif how == "8 channels":
        soundfile.write(path, np.repeat(sound[:, None], 8, axis=1), 16000)
    else:
        soundfile.write(path, sound, 192000 if how == "192 kHz" else 16000)
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: rng.randrange(len(content))]
    elif how == "flipped":
        for _ in range(rng.choice([1, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "header":
        content[:44] = rng.randbytes(44)
    elif how == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_audio_is_used_or_skipped_by_name_and_never_spoils_a_batch(tmp_path, count):
    rng = random.Random(count)
    for number in range(count):
        ending = rng.choice([".flac", ".wav", ".ogg"])
        mutate(tmp_path / f"{number:04d}{ending}", MUTATIONS[number % len(MUTATIONS)], rng)
    paths = sorted(path.name for path in tmp_path.iterdir())
    lengths, skipped = manifest.read_lengths(tmp_path, paths)
    found = Corpus(tmp_path, [(path, n) for path, n in lengths.items() if n >= 400])
    read = set()
    for i in range(len(found)):
        try:
            waveform = found.read(i)
            assert waveform.isfinite().all() and len(waveform) == found.samples[i]
            read.add(found.path(i))
        except (OSError, ValueError) as error:
            assert str(error)
            skipped[found.path(i)] = str(error)
    assert read | skipped.keys() | {p for p in lengths if lengths[p] < 400} == set(paths)
    assert count / 5 < len(read) < count


# ------------------------------------------------------------------ noise


def decibels(clean, mixed):
    return 10 * np.log10(float(clean.square().sum() / (mixed - clean).square().sum()))


def test_noise_has_the_signal_to_noise_ratio_and_depends_on_the_numbers_only(tmp_path):
    write_audio(tmp_path / "noise", [3000, 90000], seed=5)  # one repeated, one cropped
    write_audio(tmp_path / "noise" / "telephone", [20000], 8000, seed=6)
    clean = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    noise = data.Noise(find_corpus(tmp_path / "noise", ["."]), [5])
    mixed = [noise.mix(clean, (0, 0, i), {}) for i in range(30)]
    assert all(decibels(clean, x) == pytest.approx(5, abs=0.01) for x in mixed)
    assert torch.equal(mixed[7], noise.mix(clean, (0, 0, 7), {}))
    assert len({float(x[0]) for x in mixed}) == 30
    noise = data.Noise(find_corpus(tmp_path / "noise", ["."]), [0, 20], probability=0.5)
    mixed = [noise.mix(clean, (0, 0, i), {}) for i in range(200)]
    ratios = [decibels(clean, x) for x in mixed if not torch.equal(x, clean)]
    assert 70 < len(ratios) < 130 and 0 <= min(ratios) < 2 and 18 < max(ratios) <= 20


def test_batches_have_clean_and_noisy_waveforms_whatever_the_ranks(corpus, tmp_path):
    write_audio(tmp_path, [5000], seed=5)
    noise = data.Noise(find_corpus(tmp_path, ["."]), [0, 10])
    alone = TrainBatches(corpus, 6, noise=noise)[8]
    shares = [TrainBatches(corpus, 6, 0, rank, 2, noise)[8] for rank in range(2)]
    assert torch.equal(alone["waveforms"], TrainBatches(corpus, 6)[8]["waveforms"])
    assert torch.equal(alone["noisy"], torch.cat([share["noisy"] for share in shares]))
    assert not torch.equal(alone["noisy"], alone["waveforms"])


def test_in_place_of_damaged_noise_other_noise_is_drawn_and_no_utterance_is_lost(corpus, tmp_path):
    paths = write_audio(tmp_path, [5000] * 4, seed=5)
    batches = TrainBatches(corpus, 6, noise=data.Noise(find_corpus(tmp_path, ["."]), [5]))
    whole = [batches[step] for step in range(12)]
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    skipped = set()
    for step in range(12):
        batch = batches[step]
        assert batch["paths"] == whole[step]["paths"] and not batch["skipped"]["audio"]
        assert not any(map(torch.equal, batch["noisy"], batch["waveforms"]))
        skipped |= batch["skipped"]["noise"].keys()
    assert skipped == {"001.flac"}
    for path in paths:
        path.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: no utterance is readable"):
        batches[0]


@pytest.mark.parametrize("damaged", [2, 4])
def test_damaged_noise_is_counted_against_noise_and_speech_against_speech(
    job, tmp_path, capsys, monkeypatch, damaged
):
    speech = write_audio(tmp_path / "audio", [6000] * 120)
    noise = write_audio(tmp_path / "noise", [1000] * 300)
    mix, all_noise = data.Noise.mix, iter(range(10**6))

    def mix_in_order(self, waveform, seeds, skipped):  # all noise is used within 300 waveforms
        ordered = self.corpus.part(np.roll(range(300), next(all_noise)))
        return mix(data.Noise(ordered, self.snr), waveform, seeds, skipped)

    monkeypatch.setattr(data.Noise, "mix", mix_in_order)
    for path in [speech[5], *noise[:damaged]]:  # their headers are intact
        path.write_bytes(path.read_bytes()[:-500])
    settings = {"data": tmp_path / "audio", "noise": tmp_path / "noise", "noise_probability": 1}
    settings |= {"teachers": job / "hubert.pt", "steps": 40, "log_every": 40}
    arguments = flags(job, tmp_path / "out", **settings)
    if damaged == 4:
        with pytest.raises(SystemExit):
            on_cpu(train, arguments)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("train.py: 4 of 300 noise files cannot be used, over 1%: 000.flac")
        return
    on_cpu(train, arguments)
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(line.split(":")[1] for line in warnings) == [
        " skipped 000.flac",
        " skipped 001.flac",
        " skipped 005.flac",
    ]


def test_an_impossible_ratio_is_an_error_and_silence_adds_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"ratio of \[9, 5\] dB"):
        data.Noise(None, [9, 5])
    for level in (0.0, 1e-23):  # the square of 1e-23 is 0 in float32
        soundfile.write(tmp_path / "silent.wav", np.full(5000, level), 16000, subtype="FLOAT")
        noise = data.Noise(find_corpus(tmp_path, ["."]), [5, 5])
        assert torch.equal(noise.mix(torch.ones(800), 1, {}), torch.ones(800))
