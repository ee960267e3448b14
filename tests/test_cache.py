"""cache.py: cached tensors, and targets in 8 bits."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import write_audio

import cache
import data
import manifest
import program


class NoSignal:
    number = 0

    def received(self):
        return 0


def test_eight_bits_with_a_scale_per_dimension_lose_half_a_step_at_most():
    x = torch.randn(50, 6) * torch.tensor([1e-3, 0.1, 1, 10, 1000, 0])
    saved = cache.quantize(x)
    assert saved["values"].dtype == torch.int8 and saved["values"].shape == (50, 6)
    error = (cache.dequantize(**saved) - x).abs().amax(0)
    assert (error <= (x.amax(0) - x.amin(0)) / 254 / 2 * 1.01 + 1e-9).all()


@pytest.fixture
def small(tmp_path):
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)])
    return manifest.find_corpus(tmp_path / "audio", ["."], max_seconds=0.5)


@pytest.mark.parametrize("offset", [0, 27, 67])  # in standard deviations
def test_eight_bits_lose_less_than_a_hundredth_of_a_deviation_whatever_the_offset(offset):
    x = torch.randn(800, 4, generator=torch.Generator().manual_seed(0)) + offset
    error = cache.dequantize(**cache.quantize(x)) - x
    assert (error.square().mean(0).sqrt() < 0.01 * x.std(0)).all()


def test_an_interrupted_fill_continues_and_a_full_cache_computes_nothing(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "SIGNAL_EVERY", 1)
    filled, stop, computed = cache.Cache(str(tmp_path / "c"), small), NoSignal(), []

    def compute(i):
        computed.append(i)
        stop.number = 15 if len(computed) == 4 else 0
        stop.received = lambda: stop.number
        return torch.full((2,), i)

    with pytest.raises(SystemExit) as end:
        filled.fill(compute, [8] * len(small), "numbers", stop)
    assert end.value.code == 128 + 15 and computed == [0, 1, 2, 3]
    stop.number = 0
    filled.fill(compute, [8] * len(small), "numbers", NoSignal())
    filled.fill(compute, [8] * len(small), "numbers", NoSignal())
    assert computed == list(range(len(small)))
    assert [filled.load(i)[0] for i in range(len(small))] == computed


@pytest.mark.parametrize("more", [1, 20])
def test_a_rank_whose_files_are_all_computed_waits_for_the_others(
    small, tmp_path, monkeypatch, more
):
    def gather(value):  # another rank has more to compute
        return [value, value + more] if isinstance(value, int) else [value]

    monkeypatch.setattr(program, "gather", gather)
    filled = cache.Cache(str(tmp_path / "c"), small)
    filled.fill(torch.tensor, [8] * len(small), "numbers", NoSignal())
    assert not filled.find_missing()


def test_paths_in_the_cache_stay_inside_and_have_names_that_fit(tmp_path):
    paths = [str(write_audio(tmp_path / "audio", [4000])[0]), "../audio/000.flac"]
    paths.append(f"../audio/{'语' * 80}.flac")
    shutil.copy(paths[0], tmp_path / "audio" / paths[2][9:])
    paths += ["a..b.flac", "a__b.flac"]
    (tmp_path / "list").mkdir()
    corpus = manifest.Corpus(f"{tmp_path}/list", [(path, 9) for path in paths])
    inside = cache.Cache(f"{tmp_path}/cache", corpus)
    for name in paths[3:]:
        shutil.copy(paths[0], tmp_path / "list" / name)
    inside.fill(lambda i: torch.tensor(i), [1] * 5, "numbers", NoSignal())
    assert [int(inside.load(i)) for i in range(5)] == [0, 1, 2, 3, 4]
    for i in range(5):
        assert os.path.realpath(inside.path(i)).startswith(f"{tmp_path}/cache/")


def test_a_damaged_file_of_the_cache_is_deleted_but_not_one_that_the_disk_fails_to_read(
    small, tmp_path
):
    filled = cache.Cache(str(tmp_path / "c"), small)
    filled.fill(lambda i: torch.full((999,), i), [8] * len(small), "numbers", NoSignal())
    os.remove(filled.path(0))
    os.symlink("/proc/self/mem", filled.path(0))  # address 0 cannot be read
    with pytest.raises(OSError):
        filled.load(0)
    assert os.path.islink(filled.path(0))

    def killed(*_, **__):  # torch's signal handler, in the main process, between any two lines
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(torch, "load", killed)
        filled.load(3)
    for i, damage in [(1, "empty"), (2, "one bit")]:
        with open(filled.path(i), "rb+") as file:
            content = bytearray(file.read())
            content[len(content) // 2] ^= 1
            file.seek(0)
            file.write(content) if damage == "one bit" else file.truncate()
        with pytest.raises(ValueError, match="damaged, and deleted"):
            filled.load(i)
        assert not os.path.exists(filled.path(i)) and int(filled.load(3)[0]) == 3


def test_cached_tensors_of_other_audio_are_refused_at_the_start(small, tmp_path, capsys):
    filled = cache.Cache(str(tmp_path / "c"), small)
    sizes = [8] * len(small)
    filled.fill(lambda i: torch.tensor(i), sizes, "numbers", NoSignal())
    shutil.copytree(tmp_path / "audio", tmp_path / "copy")
    moved = cache.Cache(filled.folder, manifest.find_corpus(tmp_path / "copy", ["."], 0.5))
    moved.fill(None, sizes, "numbers", NoSignal())
    write_audio(tmp_path / "copy", [4000 + 1357 * i for i in range(9)], seed=1)
    with pytest.raises(SystemExit):
        moved.fill(None, sizes, "numbers", NoSignal())
    line = capsys.readouterr().err
    assert "000.flac.0-4000.pt was computed from other audio than 000.flac" in line


def test_empty_files_after_a_power_cut_are_computed_again(small, tmp_path, monkeypatch):
    filled = cache.Cache(str(tmp_path / "c"), small)
    filled.fill(torch.tensor, [8] * len(small), "numbers", NoSignal())
    open(filled.path(4), "w").close()

    def unread(*_):  # of many files, only some are read at the start
        raise OSError

    monkeypatch.setattr(cache.Cache, "load", unread)
    assert filled.find_missing() == [4]


def test_damaged_files_that_the_start_finds_are_computed_again(small, tmp_path):
    filled = cache.Cache(str(tmp_path / "c"), small)
    sizes = [8] * len(small)
    filled.fill(lambda i: torch.tensor(i), sizes, "numbers", NoSignal())
    with open(filled.path(3), "rb+") as file:
        file.truncate(100)
    computed = []
    filled.fill(lambda i: computed.append(i) or torch.tensor(i), sizes, "numbers", NoSignal())
    assert computed == [3] and int(filled.load(3)) == 3


def test_cached_tensors_are_found_and_loaded_without_the_audio(small, tmp_path):
    filled = cache.Cache(str(tmp_path / "c"), small)
    filled.fill(lambda i: torch.tensor(i), [8] * len(small), "numbers", NoSignal())
    shutil.rmtree(tmp_path / "audio")
    filled.fill(None, [8] * len(small), "numbers", NoSignal())
    assert [int(filled.load(i)) for i in range(len(small))] == list(range(len(small)))


def test_cached_targets_are_those_of_the_crop(small, tmp_path):
    filled = cache.Cache(str(tmp_path / "c"), small)

    def compute(i):  # the target of frame n is the waveform where the frame starts
        waveform = small.read(i)
        starts = torch.arange(0, len(waveform) - 399, 320)
        values = waveform[starts, None]
        return {"values": values, "scale": torch.ones(1), "zero": torch.zeros(1)}

    filled.fill(compute, [1] * len(small), "targets", NoSignal())
    batches = data.TrainBatches(small, 4)
    batches.cache = filled
    positions = set()
    for step in range(6):
        batch = batches[step]
        starts = torch.arange(0, batch["waveforms"].shape[1] - 399, 320)
        targets = cache.dequantize(batch["values"], batch["scale"], batch["zero"])
        assert torch.equal(batch["waveforms"][:, starts], targets[:, :, 0])
        positions |= set(batch["waveforms"][:, 0].tolist())
    assert len(positions) > 6 and np.isfinite(list(positions)).all()
