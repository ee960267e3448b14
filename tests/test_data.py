"""data.py: finding, reading and batching audio."""

import os
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import shared, write_audio

import data
import manifest
from data import Corpus, TrainBatches, find_corpus, load_batches, read_audio, read_manifest

LENGTHS = [400, 1000, 3199, 3200, 5000, 9600, 16000, 16001, 20000, 24000, 30000, 40000] * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    write_audio(folder, LENGTHS)
    return find_corpus(folder, ["."])


# ------------------------------------------------------------------ finding


def test_audio_of_any_format_and_rate_is_found_and_measured(tmp_path):
    write_audio(tmp_path / "a" / "deep er", [5000, 800], suffix=".wav")
    write_audio(tmp_path / "b", [7000, 7001], rate=8000, seed=1)
    write_audio(tmp_path / "b" / "überall", [4410], rate=44100, suffix=".ogg")
    write_audio(tmp_path / "not a split", [5000])
    soundfile.write(tmp_path / "a" / "telephone.sph", np.zeros(6000), 16000, format="NIST")
    (tmp_path / "a" / "notes.txt").write_text("no audio")
    found = find_corpus(tmp_path, ["a", "b"])
    lengths = {"a/deep er/000.wav": 5000, "a/deep er/001.wav": 800, "a/telephone.sph": 6000}
    lengths |= {"b/000.flac": 14000, "b/001.flac": 14002, "b/überall/000.ogg": 1600}
    assert dict(zip(found.paths, found.samples.tolist())) == lengths
    assert [len(found.read(i)) for i in range(6)] == found.samples.tolist()


def test_formats_without_seeking_are_read_from_any_sample(tmp_path):
    sound = np.sin(np.arange(48000) / 20) / 2
    soundfile.write(tmp_path / "phone.wav", sound, 8000, subtype="GSM610")
    found = find_corpus(tmp_path, ["."])
    whole = found.read(0)
    assert torch.allclose(found.read(0, 40000, 9000), whole[40000:49000], atol=1e-5)
    soundfile.write(tmp_path / "odd.wav", sound, 11127)
    with pytest.raises(ValueError, match="odd.wav: cannot be read: a rate of 11127 Hz"):
        find_corpus(tmp_path, ["."])


def test_dot_files_are_ignored_and_formats_that_cannot_be_read_are_counted(tmp_path, capsys):
    write_audio(tmp_path, [5000])
    (tmp_path / "._000.flac").write_bytes(b"\0\5\x16\7 AppleDouble")
    (tmp_path / ".cache").mkdir()
    write_audio(tmp_path / ".cache", [5000])
    for name in ("a.m4a", "b.M4A", "c.wma"):
        (tmp_path / name).write_bytes(b"?")
    assert find_corpus(tmp_path, ["."]).paths == ["000.flac"]
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "2 .m4a" in line and "1 .wma" in line


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    write_audio(tmp_path / "here", [5000])
    write_audio(tmp_path / "there", [6000])
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    assert find_corpus(tmp_path, ["here"]).paths == ["here/000.flac", "here/link/000.flac"]


@pytest.mark.parametrize("length", [0, 2**36 - 1])
def test_a_flac_without_a_length_is_skipped_and_named(tmp_path, length):
    paths = write_audio(tmp_path, [6000] * 100)
    content = bytearray(paths[3].read_bytes())
    rest = int.from_bytes(content[18:26], "big") >> 36 << 36  # STREAMINFO ends with 36 bits of it
    content[18:26] = (rest | length).to_bytes(8, "big")
    paths[3].write_bytes(content)
    found = find_corpus(tmp_path, ["."])
    assert len(found) == 99 and 0 < found.hours() < 1
    assert list(found.skipped) == ["003.flac"] and "length" in found.skipped["003.flac"]


def test_over_one_percent_of_unreadable_files_is_an_error_that_names_one(tmp_path):
    paths = write_audio(tmp_path, [5000] * 99 + [399])
    paths[7].write_bytes(b"fLaC and nothing more")
    found = find_corpus(tmp_path, ["."])
    assert len(found) == 98 and sorted(found.skipped) == ["007.flac", "099.flac"]
    assert "399 samples" in found.skipped["099.flac"]
    paths[8].write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 100 audio files .* 00[78].flac"):
        find_corpus(tmp_path, ["."])


def test_names_that_are_not_utf8_are_read(tmp_path):
    (whole,) = write_audio(tmp_path, [5000])
    os.rename(whole, os.path.join(os.fsencode(tmp_path), b"\xff\xfe.flac"))
    found = find_corpus(tmp_path, ["."])
    manifest.write_manifest(tmp_path / "list.tsv", found)
    assert len(read_manifest(tmp_path / "list.tsv").read(0)) == 5000


@pytest.mark.parametrize("rate", [16000, 44100])
def test_long_files_are_used_in_equal_pieces_that_join_to_the_file(tmp_path, rate):
    write_audio(tmp_path, [rate, 5 * rate], rate=rate)
    found = find_corpus(tmp_path, ["."], max_seconds=1.5)
    assert found.paths == ["000.flac"] + ["001.flac"] * 4 and len(found.files) == 2
    assert found.starts.tolist() == [0, 0, 20000, 40000, 60000]
    assert found.samples.tolist() == [16000] + [20000] * 4
    manifest.write_manifest(tmp_path / "list.tsv", found)
    listed = read_manifest(tmp_path / "list.tsv")
    joined = torch.cat([listed.read(i) for i in range(1, 5)])
    lines = (tmp_path / "list.tsv").read_text().splitlines(keepends=True)
    assert lines[1].count("\t") == 1 and lines[2].count("\t") == 2
    for used in (2, 3):  # the first piece of a file alone; its first two
        (tmp_path / "part.tsv").write_text("".join([lines[0], *lines[2 : 1 + used]]))
        assert torch.equal(
            read_manifest(tmp_path / "part.tsv").read(used - 2), listed.read(used - 1)
        )
    whole = read_audio(tmp_path / "001.flac")
    assert (joined - whole).abs().max() < 1e-5
    assert len(find_corpus(tmp_path, ["."], max_seconds=float("inf"))) == 2
    with pytest.raises(ValueError, match="--max-seconds"):
        find_corpus(tmp_path, ["."], max_seconds=0.01)


# ------------------------------------------------------------------ manifests


@pytest.mark.parametrize("form", ["absolute", "relative root", "CRLF"])
def test_fairseqs_manifests_are_read(tmp_path, form):
    paths = write_audio(tmp_path / "audio", [5000, 6000])
    root = "audio" if form == "relative root" else f"{tmp_path}/audio"
    names = paths if form == "absolute" else ["000.flac", "001.flac"]
    end = "\r\n" if form == "CRLF" else "\n"
    lines = [root, f"{names[0]}\t5000", f"{names[1]}\t6000", ""]
    (tmp_path / "train.tsv").write_bytes(end.join(lines).encode())
    found = find_corpus(tmp_path / "train.tsv")
    assert [len(found.read(i)) for i in range(2)] == [5000, 6000]


def test_a_manifest_that_counts_at_another_rate_is_refused_with_the_cause(tmp_path):
    write_audio(tmp_path, [7000, 7001], rate=8000)
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\n000.flac\t7000\n001.flac\t7001\n")
    with pytest.raises(ValueError, match="000.flac has 14000 samples .*, not 7000"):
        find_corpus(tmp_path / "train.tsv")
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\n000.flac\t14000\n001.flac\t14002\n")
    assert find_corpus(tmp_path / "train.tsv").samples.tolist() == [14000, 14002]


@pytest.mark.parametrize("line", ["b.flac 6000", "b.flac\t-1", "b.flac\tten"])
def test_a_line_that_is_not_of_a_manifest_is_named(tmp_path, line):
    (tmp_path / "train.tsv").write_text(f"/root\na.flac\t5000\n{line}\n")
    with pytest.raises(ValueError, match="line 3"):
        find_corpus(tmp_path / "train.tsv")


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
    causes = {"replaced": "has 9000 samples at 16 kHz, expected 8000", "nan": "not finite"}
    causes["odd rate"] = "15999 Hz"
    with pytest.raises((ValueError, soundfile.SoundFileError), match=causes.get(damage)):
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
        assert item["waveforms"].shape == (6, crops_of(batches, 0)[step]) and not item["skipped"]


def crops_of(batches, epoch):
    return batches.plan(epoch)[1].tolist()


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
    assert set(alone["skipped"]) == {"001.flac", "002.flac"}
    assert "6400 samples at 16 kHz, expected 6000" in alone["skipped"]["002.flac"]
    by_path = dict(zip(whole["paths"], whole["waveforms"]))
    assert all(map(torch.equal, alone["waveforms"], (by_path[path] for path in alone["paths"])))
    assert torch.equal(alone["waveforms"], torch.cat([share["waveforms"] for share in shares]))
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no utterance is readable"):
        TrainBatches(found, 8)[0]


def test_a_batch_larger_than_the_corpus_is_refused(corpus):
    with pytest.raises(ValueError, match="37 .* 36"):
        TrainBatches(corpus, 37)


def test_too_little_shared_memory_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 3, 64e6))
    data.check_shared_memory(24e6, workers=0)
    data.check_shared_memory(24e6, workers=1)
    with pytest.raises(ValueError, match="--workers 4 need 192 MB .*, 64 MB are free.*--shm-size"):
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
    long_enough = [path for path in lengths if lengths[path] >= 400]
    found = Corpus(tmp_path, long_enough, [0] * len(long_enough), [lengths[p] for p in long_enough])
    read = set()
    for i in range(len(found)):
        try:
            waveform = found.read(i)
            assert waveform.isfinite().all() and len(waveform) == found.samples[i]
            read.add(found.paths[i])
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            assert str(error)
            skipped[found.paths[i]] = str(error)
    assert read | skipped.keys() | {p for p in lengths if lengths[p] < 400} == set(paths)
    assert count / 5 < len(read) < count


def test_real_speech_is_found_with_its_transcripts_beside_it():
    found = find_corpus(shared("speech/LibriSpeech"), ["dev-clean"])
    assert 20 < len(found) and 0.01 < found.hours() < 1
    path = pathlib.Path(found.root, found.paths[0])
    assert len(found.read(0)) == soundfile.info(path).frames


# ------------------------------------------------------------------ noise


def decibels(clean, mixed):
    return 10 * np.log10(float(clean.square().sum() / (mixed - clean).square().sum()))


def test_noise_has_the_signal_to_noise_ratio_and_depends_on_the_numbers_only(tmp_path):
    write_audio(tmp_path / "noise", [3000, 90000], seed=5)  # one repeated, one cropped
    write_audio(tmp_path / "noise" / "telephone", [20000], 8000, seed=6)
    clean = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    noise = data.Noise(tmp_path / "noise", [5])
    mixed = [noise.mix(clean, 0, 0, i) for i in range(30)]
    assert all(decibels(clean, x) == pytest.approx(5, abs=0.01) for x in mixed)
    assert torch.equal(mixed[7], noise.mix(clean, 0, 0, 7))
    assert len({float(x[0]) for x in mixed}) == 30
    noise = data.Noise(tmp_path / "noise", [0, 20], probability=0.5)
    mixed = [noise.mix(clean, 0, 0, i) for i in range(200)]
    ratios = [decibels(clean, x) for x in mixed if not torch.equal(x, clean)]
    assert 70 < len(ratios) < 130 and 0 <= min(ratios) < 2 and 18 < max(ratios) <= 20


def test_batches_have_clean_and_noisy_waveforms_whatever_the_ranks(corpus, tmp_path):
    write_audio(tmp_path, [5000], seed=5)
    noise = data.Noise(tmp_path, [0, 10])
    alone = TrainBatches(corpus, 6, noise=noise)[8]
    shares = [TrainBatches(corpus, 6, 0, rank, 2, noise)[8] for rank in range(2)]
    assert torch.equal(alone["waveforms"], TrainBatches(corpus, 6)[8]["waveforms"])
    assert torch.equal(alone["noisy"], torch.cat([share["noisy"] for share in shares]))
    assert not torch.equal(alone["noisy"], alone["waveforms"])


def test_a_damaged_noise_file_counts_once_whatever_draws_it(corpus, tmp_path):
    paths = write_audio(tmp_path, [5000] * 4, seed=5)
    batches = TrainBatches(corpus, 6, noise=data.Noise(tmp_path, [5]))
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    skipped = {}
    for step in range(12):
        batch = batches[step]
        assert len(batch["noisy"]) == 6
        skipped |= batch["skipped"]
    assert skipped.keys() == {"001.flac"} and "its noise 001.flac" in skipped["001.flac"]


def test_a_folder_without_noise_is_an_error_and_silence_adds_nothing(tmp_path):
    with pytest.raises(ValueError, match="no audio files"):
        data.Noise(tmp_path, [5])
    with pytest.raises(ValueError, match=r"--snr \[9, 5\]"):
        data.Noise(tmp_path, [9, 5])
    for level in (0.0, 1e-23):  # the square of 1e-23 is 0 in float32
        soundfile.write(tmp_path / "silent.wav", np.full(5000, level), 16000, subtype="FLOAT")
        assert torch.equal(data.Noise(tmp_path, [5, 5]).mix(torch.ones(800), 1), torch.ones(800))
