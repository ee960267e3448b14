"""manifest.py: the Corpus, finding audio files, reading and writing manifests."""

import errno
import itertools
import os
import pathlib
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from conftest import shared, write_audio

import manifest
from data import read_audio
from manifest import Corpus, find_corpus, read_manifest

# ------------------------------------------------------------------ the Corpus


def test_a_corpus_takes_little_memory_and_none_of_it_is_copied_by_a_reader():
    rows = ((f"{i:059d}.flac", 5000 + i) for i in range(100_000))
    tracemalloc.start()
    large = Corpus("/root", rows)
    size, _ = tracemalloc.get_traced_memory()
    for i in range(0, len(large), 2):  # strings would be stored, and counted by references
        assert large.path(i) == f"{i:059d}.flac"
    added = tracemalloc.get_traced_memory()[0] - size
    tracemalloc.stop()
    assert size < 110 * len(large) and added < len(large)


def test_a_part_of_a_corpus_has_its_utterances_in_the_given_order():
    whole = Corpus("/root", [("a", 500), ("b", 0, 600), ("b", 600, 700), ("ü\udcff", 800)])
    part = whole.part([3, 1, 1])
    assert list(part.paths()) == ["ü\udcff", "b", "b"] and part.samples.tolist() == [800, 600, 600]
    assert part.whole.tolist() == [1, 0, 0] and part.file_count() == 2 and whole.file_count() == 3
    assert not whole.part([])


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
    assert dict(zip(found.paths(), found.samples.tolist())) == lengths
    assert [len(found.read(i)) for i in range(6)] == found.samples.tolist()


def test_formats_without_seeking_are_read_from_any_sample(tmp_path):
    sound = np.sin(np.arange(48000) / 20) / 2
    soundfile.write(tmp_path / "phone.wav", sound, 8000, subtype="GSM610")
    found = find_corpus(tmp_path, ["."])
    whole = found.read(0)
    assert torch.allclose(found.read(0, 40000, 9000), whole[40000:49000], atol=1e-5)
    soundfile.write(tmp_path / "odd.wav", sound, 11127)
    with pytest.raises(ValueError, match="odd.wav: a rate of 11127 Hz"):
        find_corpus(tmp_path, ["."])


def test_dot_files_are_ignored_and_formats_that_cannot_be_read_are_counted(tmp_path):
    write_audio(tmp_path, [5000])
    (tmp_path / "._000.flac").write_bytes(b"\0\5\x16\7 AppleDouble")
    for folder in (".cache", "lost+found"):
        write_audio(tmp_path / folder, [5000])
    for name in ("a.m4a", "b.M4A", "c.wma"):
        (tmp_path / name).write_bytes(b"?")
    with pytest.warns(match="convert to FLAC: 2 .m4a, 1 .wma"):
        assert list(find_corpus(tmp_path, ["."]).paths()) == ["000.flac"]


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    write_audio(tmp_path / "here", [5000])
    write_audio(tmp_path / "there", [6000])
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    assert list(find_corpus(tmp_path, ["here"]).paths()) == ["here/000.flac", "here/link/000.flac"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_audio(tmp_path / name, [5000])
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error: '.*/b'"):
        find_corpus(tmp_path, ["."])


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
    assert list(found.paths()) == ["000.flac"] + ["001.flac"] * 4 and found.file_count() == 2
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
    with pytest.raises(ValueError, match="0.01 s are too short"):
        find_corpus(tmp_path, ["."], max_seconds=0.01)


def test_audio_files_are_counted_without_reading_them(tmp_path):
    write_audio(tmp_path / "a" / "b", [5000, 399])
    (tmp_path / "a" / "empty.flac").write_bytes(b"")
    (tmp_path / "c").mkdir()
    assert len(manifest.list_audio(tmp_path, ["a", "a/b", "c"])) == 3


def test_a_long_scan_prints_lines_with_what_is_left(tmp_path, capsys, monkeypatch):
    write_audio(tmp_path, [5000] * 3)
    now = itertools.count(0, 30)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    find_corpus(tmp_path, ["."])
    printed = capsys.readouterr().out
    assert f"audio files in {tmp_path}: 1 so far" in printed
    assert "headers of audio files: 3 of 3, 0 s left" in printed


def test_an_undecodable_file_is_named_with_that_reason_first(tmp_path):
    paths = write_audio(tmp_path, [5000] * 100, suffix=".mp3")
    paths[3].write_bytes(bytes(5000))
    (reason,) = find_corpus(tmp_path, ["."]).skipped.values()
    assert reason.startswith("cannot be decoded (libsndfile: ")


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


def test_real_speech_is_found_with_its_transcripts_beside_it():
    found = find_corpus(shared("speech/LibriSpeech"), ["dev-clean"])
    assert 20 < len(found) and 0.01 < found.hours() < 1
    path = pathlib.Path(found.root, found.path(0))
    assert len(found.read(0)) == soundfile.info(path).frames
