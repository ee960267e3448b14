"""data.py: finding, reading and cutting audio."""

import os
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import shared, write_audio

import data
from data import Batches, Corpus, find_corpus, load_batches, read_audio, write_manifest

LENGTHS = [400, 1000, 3199, 3200, 5000, 9600, 16000, 16001, 20000, 24000, 30000, 40000] * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    write_audio(folder, LENGTHS)
    return find_corpus(str(folder), ["."])


# ---------------------------------------------------------------- which files


def test_any_folder_of_audio_is_found_and_measured(tmp_path):
    write_audio(tmp_path / "a" / "deep er", [5000, 800], suffix=".wav")
    write_audio(tmp_path / "b", [7000, 7001], rate=8000, seed=1)
    write_audio(tmp_path / "b" / "überall", [4410], rate=44100, suffix=".ogg")
    write_audio(tmp_path / "not asked for", [5000])
    (tmp_path / "a" / "notes.txt").write_text("no audio")
    found = find_corpus(str(tmp_path), ["a", "b"])
    names = ["a/deep er/000.wav", "a/deep er/001.wav", "b/000.flac", "b/001.flac", "b/überall/000.ogg"]
    assert dict(zip(found.paths, found.samples.tolist())) == dict(zip(names, [5000, 800, 14000, 14002, 1600]))
    for path, samples in zip(found.paths, found.samples):
        assert len(read_audio(os.path.join(found.root, path))) == samples


def test_a_scan_is_kept_as_a_fairseq_manifest_and_not_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    write_audio(folder / "one", [5000, 6000])
    time.sleep(0.1)  # what changed just before a scan is looked at again
    first = find_corpus(str(folder), ["one"])
    cache = os.path.join(torch.hub.get_dir(), "ekd-manifests")
    manifest = next(name for name in os.listdir(cache) if name.startswith("corpus-") and name.endswith(".tsv"))
    lines = open(os.path.join(cache, manifest)).read().splitlines()
    assert lines == [str(folder), "one/000.flac\t5000", "one/001.flac\t6000"]

    monkeypatch.setattr(data.soundfile, "info", lambda *_: pytest.fail("a header was read again"))
    assert find_corpus(str(folder), ["one"]).fingerprint() == first.fingerprint()
    monkeypatch.undo()
    time.sleep(0.02)
    write_audio(folder / "one" / "new", [7000])
    assert find_corpus(str(folder), ["one"]).samples.tolist() == [5000, 6000, 7000]


def test_a_fairseq_manifest_is_read_as_it_is(tmp_path):
    write_audio(tmp_path, [5000, 6000])
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{tmp_path}\r\n000.flac\t5000\r\n{tmp_path}/001.flac\t6000\r\n")
    found = find_corpus(str(manifest))
    assert found.samples.tolist() == [5000, 6000]
    assert [len(read_audio(os.path.join(found.root, path))) for path in found.paths] == [5000, 6000]


def test_a_line_that_is_no_manifests_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("/root\na.flac\t5000\nb.flac 6000\n")
    with pytest.raises(ValueError, match="line 3"):
        find_corpus(str(tmp_path / "train.tsv"))


def test_files_that_cannot_be_read_or_are_too_short_are_left_out_and_named(tmp_path):
    write_audio(tmp_path, [5000] * 110 + [399, 0, 400])
    (tmp_path / "broken.flac").write_bytes(b"fLaC and nothing more")
    found = find_corpus(str(tmp_path), ["."])
    assert len(found) == 111 and found.samples.min() == 400
    assert set(found.left_out) == {"110.flac", "111.flac", "broken.flac"}
    assert "399" in found.left_out["110.flac"] and "read" in found.left_out["broken.flac"]
    assert find_corpus(str(tmp_path), ["."]).left_out == found.left_out  # from the manifest too


@pytest.mark.parametrize("how", ["copied with its time", "written anew, longer"])
def test_a_corpus_that_is_mended_in_place_is_accepted(tmp_path, how):
    paths = write_audio(tmp_path / "audio", [5000] * 12)
    whole = tmp_path / "whole.flac"
    shutil.copy2(paths[3], whole)
    time.sleep(0.1)
    paths[3].write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 12"):
        find_corpus(str(tmp_path / "audio"), ["."])
    time.sleep(0.1)
    if how.startswith("copied"):
        shutil.copy2(whole, paths[3])
        lengths = [5000] * 12
    else:
        soundfile.write(paths[3], np.zeros(7000), 16000)
        lengths = [5000] * 3 + [7000] + [5000] * 8
    assert find_corpus(str(tmp_path / "audio"), ["."]).samples.tolist() == lengths
    time.sleep(0.1)
    soundfile.write(paths[5], np.zeros(8000), 16000)  # of an accepted scan too
    assert find_corpus(str(tmp_path / "audio"), ["."]).samples[5] == 8000


def test_a_damaged_manifest_in_the_cache_is_made_anew(tmp_path):
    write_audio(tmp_path / "kept", [5000])
    find_corpus(str(tmp_path / "kept"), ["."])
    cache = os.path.join(torch.hub.get_dir(), "ekd-manifests")
    (name,) = (name for name in os.listdir(cache) if name.startswith("kept-") and name.endswith(".tsv"))
    with open(os.path.join(cache, name), "w") as file:
        file.write("/nowhere\nhalf a li")
    assert find_corpus(str(tmp_path / "kept"), ["."]).samples.tolist() == [5000]


def test_names_that_are_not_utf_8_are_read_and_names_with_a_line_break_are_counted(tmp_path):
    (whole,) = write_audio(tmp_path, [5000])
    odd = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.flac")
    shutil.copy(whole, odd)
    for name in ("two\nlines.flac", "two\rlines.flac"):
        shutil.copy(whole, tmp_path / name)
    for _ in range(2):  # from the manifest too
        found = find_corpus(str(tmp_path), ["."])
        assert found.samples.tolist() == [5000, 5000] and os.fsdecode(b"\xff\xfe.flac") in found.paths
        assert found.left_out == dict.fromkeys(["two\nlines.flac", "two\rlines.flac"], "a line break in its name")
    assert not Batches(found, 2, 25000)[0]["left_out"]


def test_a_manifest_with_a_byte_order_mark_and_a_relative_root_is_read(tmp_path):
    write_audio(tmp_path / "audio", [5000, 6000])
    (tmp_path / "lists").mkdir()
    lines = "../audio\n000.flac\t5000\n001.flac\t6000\n"
    (tmp_path / "lists" / "train.tsv").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = find_corpus(str(tmp_path / "lists" / "train.tsv"))
    assert not Batches(found, 2, 25000)[0]["left_out"] and found.samples.tolist() == [5000, 6000]


@pytest.mark.parametrize("length", ["²", "99999999999999999999", "-5", "5e3", ""])
def test_a_length_that_is_none_is_refused_by_its_line(tmp_path, length):
    (tmp_path / "train.tsv").write_text(f"/root\na.flac\t5000\nb.flac\t{length}\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3"):
        find_corpus(str(tmp_path / "train.tsv"))


def test_a_manifest_of_files_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("/root\na.flac\t5000\nb.flac\t0\n")
    with pytest.raises(ValueError, match=r"train\.tsv: 1 of 2"):
        find_corpus(str(tmp_path / "train.tsv"))


def test_over_one_percent_of_unreadable_files_is_an_error(tmp_path):
    write_audio(tmp_path, [5000] * 50)
    (tmp_path / "broken.flac").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 51.*over 1%"):
        find_corpus(str(tmp_path), ["."])


def test_missing_or_empty_data_is_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no such split"):
        find_corpus(str(tmp_path), ["train-clean-100"])
    with pytest.raises(ValueError, match="no audio"):
        find_corpus(str(tmp_path), ["empty"])
    with pytest.raises(FileNotFoundError, match="gone.tsv"):
        find_corpus(str(tmp_path / "gone.tsv"))


# ---------------------------------------------------------------- reading


def test_channels_are_averaged_and_rates_resampled(tmp_path):
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 44100))
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 44100, subtype="FLOAT")
    mono = torch.from_numpy(((left + right) / 2).astype(np.float32))
    expected = torchaudio.functional.resample(mono, 44100, 16000)
    assert torch.allclose(read_audio(tmp_path / "stereo.wav"), expected, atol=1e-6)
    assert torch.allclose(read_audio(tmp_path / "stereo.wav", 1000, 500), expected[1000:1500], atol=1e-6)


def test_only_the_samples_needed_are_read(tmp_path, monkeypatch):
    path = write_audio(tmp_path, [50000])[0]
    whole, asked = read_audio(path), []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **k: asked.append((self.tell(), frames)) or read(self, frames, **k),
    )
    assert torch.equal(read_audio(path, 20000, 1234), whole[20000:21234])
    assert asked == [(20000, 1234)]


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_file_that_ends_too_early_or_holds_no_numbers_is_an_error(rate, tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="finite"):
        read_audio(tmp_path / "nan.wav", 0, 4000)
    with pytest.raises(ValueError, match="ends after"):
        read_audio(write_audio(tmp_path, [5000], rate)[0], 8000, 4000)


# ---------------------------------------------------------------- batches


def everything(corpus, processes=1, workers=0, first=0, last=6, seed=0):
    """(paths, waveforms) of each step's global batch, as `processes` processes with `workers` each would load it."""
    shares = [
        load_batches(Batches(corpus, 8, 25000, seed, rank, processes), first, last, workers)
        for rank in range(processes)
    ]
    return [(sum((s["paths"] for s in step), []), torch.cat([s["waveforms"] for s in step])) for step in zip(*shares)]


def same(a, b):
    return len(a) == len(b) and all(p == q and torch.equal(v, w) for (p, v), (q, w) in zip(a, b))


def test_batches_are_the_same_for_any_number_of_processes_and_workers(corpus):
    one = everything(corpus)
    assert same(everything(corpus, processes=2), one)
    assert same(everything(corpus, processes=4, workers=1), one)
    assert same(everything(corpus, workers=2), one)


def test_a_resume_goes_on_where_it_left_off_and_reads_nothing_before(corpus, monkeypatch):
    whole, read = everything(corpus, last=10), []
    monkeypatch.setattr(data, "read_audio", lambda path, *rest: read.append(path) or read_audio(path, *rest))
    assert same(everything(corpus, first=7, last=10), whole[7:])
    assert len(read) == 3 * 8


def test_seeds_and_epochs_differ(corpus):
    batches = Batches(corpus, 8, 25000)
    orders = [batches.plan(epoch)[0].tolist() for epoch in (0, 1)] + [
        Batches(corpus, 8, 25000, seed=1).plan(0)[0].tolist()
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert orders[0] == Batches(corpus, 8, 25000).plan(0)[0].tolist()


def test_an_epoch_takes_no_utterance_twice_and_leaves_out_less_than_a_batch(corpus):
    for epoch in range(3):
        taken = Batches(corpus, 8, 25000).plan(epoch)[0].ravel()
        assert len(set(taken.tolist())) == len(taken) == len(corpus) // 8 * 8


def test_nothing_is_padded_and_cuts_are_on_the_grid_up_to_the_longest_allowed(corpus):
    batches, cuts = Batches(corpus, 8, 25000), []
    for step in range(12):
        item = batches[step]
        cuts.append(item["waveforms"].shape[1])
        members = [corpus.samples[corpus.paths.index(path)] for path in item["paths"]]
        assert cuts[-1] <= min(members) and cuts[-1] <= 25000
        assert cuts[-1] % 3200 == 0 or cuts[-1] == min(members) < 3200
        assert (item["waveforms"].abs().amax(dim=1) > 0).all() and not item["left_out"]
    assert max(cuts) == 22400


def test_similar_lengths_come_together():
    samples = np.random.default_rng(0).integers(16000, 240000, 2400)
    corpus = Corpus("/", [str(i) for i in range(2400)], samples)
    utterances, cuts, _ = Batches(corpus, 24, 250000).plan(0)
    assert (cuts * 24).sum() > 0.93 * samples[utterances].sum()


def test_crops_fall_anywhere_in_an_utterance(corpus):
    paths = corpus.paths.index("011.flac")
    positions = [Batches(corpus, 8, 25000).plan(epoch)[2][paths] for epoch in range(50)]
    assert min(positions) < 0.15 and max(positions) > 0.85


def test_an_utterance_that_cannot_be_read_is_silent_and_named(tmp_path):
    write_audio(tmp_path, [5000] * 4)
    found = find_corpus(str(tmp_path), ["."])
    (tmp_path / "002.flac").write_bytes((tmp_path / "002.flac").read_bytes()[:300])
    os.remove(tmp_path / "003.flac")
    item = Batches(found, 4, 25000)[0]
    assert set(item["left_out"]) == {"002.flac", "003.flac"}
    silent = {path for path, waveform in zip(item["paths"], item["waveforms"]) if not waveform.any()}
    assert silent == {"002.flac", "003.flac"}


def test_batches_that_cannot_be_made_are_refused(corpus):
    with pytest.raises(ValueError, match="a batch of 8 does not divide over 3"):
        Batches(corpus, 8, 25000, world_size=3)
    with pytest.raises(ValueError, match="a batch of 40 is more than the 36 utterances"):
        Batches(corpus, 40, 25000)


def test_a_manifest_of_librispeechs_size_is_read_and_planned_quickly(tmp_path):
    paths = [f"train-clean-360/{i // 100}/{i // 10}/{i // 100}-{i // 10}-{i:04d}.flac" for i in range(281_000)]
    write_manifest(str(tmp_path / "big.tsv"), "/data", paths, [16000 + i for i in range(281_000)])
    start = time.monotonic()
    Batches(find_corpus(str(tmp_path / "big.tsv")), 24, 250_000).plan(0)
    assert time.monotonic() - start < 10


def test_real_speech_in_librispeechs_layout_is_found():
    found = find_corpus(str(shared("speech/LibriSpeech")), ["dev-clean", "test-clean"])
    assert len(found) == 74 and not found.left_out
    assert all(len(read_audio(os.path.join(found.root, p))) == n for p, n in zip(found.paths[:5], found.samples))
