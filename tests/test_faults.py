"""What a user can count on: each fault is injected into the real thing, and what must hold is checked."""

import dataclasses
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import (
    ROOT,
    SMALL,
    environment,
    flags_of,
    metrics,
    obey_permissions,
    on_cpu,
    random_encoder,
    refused,
    run,
    write_audio,
)

import data
import evaluate_pr
import train
from encoder import SpeechEncoder
from export import save_official, write_transformers
from student import Student, load_student, save_student, student_config
from teachers import load_teacher

PROGRAMS = sorted(path.name for path in ROOT.glob("*.py"))
MODULES = [name for name in PROGRAMS if "__main__" not in (ROOT / name).read_text()]  # have no command line


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with audio and two small teachers."""
    folder = tmp_path_factory.mktemp("job")
    write_audio(folder / "audio", [6000 + 397 * i for i in range(25)])
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    save_official(random_encoder(2, relative_buckets=320), folder / "wavlm.pt", "microsoft")
    return folder


def flags(job, out, **more):
    settings = dict(teachers=f"{job}/hubert.pt,{job}/wavlm.pt", heads="2,4", data=job / "audio", splits=".")
    settings |= dict(steps=6, batch_size=8, lr=1e-3, max_seconds=0.5, precision="fp32", workers=0, log_every=1)
    return flags_of(settings | dict(save_every=2, out=out) | more)


def distil(job, out, **more):
    on_cpu(train, flags(job, out, **more))


def refusal(capsys, job, out, **more):
    """The one line on stderr with which train.py ends, in this process."""
    return refused(capsys, train, flags(job, out, **more))


def start(job, out, processes=None, restarts=0, **more):
    """train.py as a process that is going on; its screen is a pipe, its errors too."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [f"--max-restarts={restarts}"]
    command += [str(ROOT / "train.py"), *flags(job, out, **more)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=job, env=environment(), **pipes)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text!r} never came: {process.stderr.read()}")


def children(pid):
    """Process numbers of the children of a process, and theirs."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found + [grandchild for child in found for grandchild in children(child)]


def state(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(a, b):
    """The student and the optimizer, bit for bit."""
    assert a["step"] == b["step"]
    assert all(torch.equal(tensor, b["student"][name]) for name, tensor in a["student"].items())
    for number, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(b["optimizer"]["state"][number][key], value) for key, value in moments.items())


@pytest.fixture(scope="module")
def whole(job):
    """The folder of a run of 6 steps that nothing disturbed."""
    distil(job, job / "whole")
    return job / "whole"


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(job, kills):
    settings = dict(steps=20 + 20 * kills, save_every=2, workers=1, dropout=0.1)
    out, rng = job / f"killed{kills}", random.Random(kills)
    spared = run("train.py", *flags(job, job / f"spared{kills}", **settings), cwd=job)
    assert spared.returncode == 0, spared.stderr
    for number in range(kills):
        process = start(job, out, **settings)
        if number % 5 == 4:  # some at the start, the others among steps and saves
            time.sleep(rng.uniform(0, 6))
        else:
            wait_for(process, "step " if number else f" 5/{settings['steps']}")
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended by itself before kill {number + 1}"
    done = run("train.py", *flags(job, out, **settings), cwd=job)
    # A fast machine may have done the last step before the last kill.
    assert done.returncode == 0 and ("resuming after step" in done.stdout or ": finished" in done.stdout), done.stderr
    assert_same_run(state(out), state(job / f"spared{kills}"))
    assert [line["step"] for line in metrics(out)] == list(range(1, 20 * kills + 21))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_torchrun_that_is_interrupted_has_saved_and_is_resumed_exactly(job, number):
    settings, out = dict(steps=60, processes=2), job / f"torchrun{int(number)}"
    settings.pop("processes")
    if not (job / "two").exists():
        assert run("train.py", *flags(job, job / "two", **settings), cwd=job, processes=2).returncode == 0
    process = start(job, out, processes=2, **settings)
    wait_for(process, "step  5/60")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    stopped = state(out)["step"]
    assert process.returncode != 0 and f"interrupted; step {stopped} of 60 is saved" in errors
    assert run("train.py", *flags(job, out, **settings), cwd=job, processes=2).returncode == 0
    assert_same_run(state(out), state(job / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_the_job_within_a_minute_or_is_started_again(job, restarts):
    settings, out = dict(steps=40, save_every=3), job / f"rank{restarts}"
    process = start(job, out, processes=2, restarts=restarts, **settings)
    wait_for(process, "step  8/40")
    ranks = [pid for pid in children(process.pid) if b"train.py" in open(f"/proc/{pid}/cmdline", "rb").read()]
    os.kill(ranks[-1], signal.SIGKILL)
    killed = time.monotonic()
    printed, errors = process.communicate(timeout=120)
    if restarts:
        assert process.returncode == 0 and "resuming after step" in printed, errors[-3000:]
    else:
        assert process.returncode != 0 and time.monotonic() - killed < 60
        assert run("train.py", *flags(job, out, **settings), cwd=job, processes=2).returncode == 0
    assert run("train.py", *flags(job, job / "ranks", **settings), cwd=job, processes=2).returncode == 0
    assert_same_run(state(out), state(job / "ranks"))


def test_a_second_run_is_refused_and_a_killed_loader_and_a_full_disk_are_named(job, capsys):
    out, settings = job / "busy", dict(steps=5000, workers=1, save_every=5)
    process = start(job, out, **settings)
    try:
        wait_for(process, "step   20/5000")
        (loader,) = (pid for pid in children(process.pid) if b"train.py" in open(f"/proc/{pid}/cmdline", "rb").read())
        assert "another run" in refusal(capsys, job, out, **settings)
        assert process.poll() is None
        os.kill(loader, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert errors.count("\n") == 1 and "a process that reads audio died" in errors, errors
    if not (out / "last.pt").exists():  # it died between the two names of a save
        os.rename(out / "last.1.pt", out / "last.pt")
    saved = state(out)["step"]
    assert saved >= 15

    process = start(job, out, **settings)
    try:
        wait_for(process, f"resuming after step {saved}")
        wait_for(process, f"step {saved + 10:>4}/5000")
        limit = (out / "last.pt").stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and errors.count("\n") == 1 and "not written" in errors, errors
    assert not list(out.glob("*.partial"))
    stopped = state(out)["step"]
    assert stopped > saved and torch.load(out / "last.1.pt", weights_only=True)["step"] == stopped - 5


def test_an_evaluation_in_a_folder_where_another_is_at_work_is_refused(corpus, tmp_path, capsys):
    code = "import sys; from safe_files import claimed; c = claimed(sys.argv[1]); c.__enter__(); print('claimed', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), **pipes) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(SystemExit) as end:
            common = ["--upstream", "fbank", "--steps", "1", "--out", str(tmp_path)]
            evaluate_pr.main([*common, "--data", str(corpus), "--lexicon", f"{corpus}/lexicon.txt"])
        other.stdin.close()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "another run" in line
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "one byte", "another file", "missing"])
def test_a_damaged_save_gives_way_to_the_one_before(job, whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path / "out")
    last = tmp_path / "out" / "last.pt"
    spoil(last, damage, tmp_path / "out" / "student.pt")
    distil(job, tmp_path / "out")
    captured = capsys.readouterr()
    assert "resuming after step 4" in captured.out
    if damage != "missing":
        assert captured.err.count("\n") == 1 and "last.pt: damaged" in captured.err and "last.1.pt" in captured.err
    assert_same_run(state(tmp_path / "out"), state(whole))


def spoil(path, damage, other):
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif damage == "one byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "another file":
        shutil.copy(other, path)
    else:
        path.unlink()


def test_without_a_whole_save_the_run_says_so_and_touches_nothing(job, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    for name in ("last.pt", "last.1.pt"):
        spoil(tmp_path / "out" / name, "zeroed", None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    line = refusal(capsys, job, tmp_path / "out")
    assert "last.pt" in line and "last.1.pt" in line and "move" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_saves_stay_as_are_asked_for(job, tmp_path, keep):
    distil(job, tmp_path / "out", steps=9, save_every=2, keep=keep)
    names = ["last.pt", "last.1.pt", "last.2.pt", "last.3.pt"]
    steps = [
        torch.load(tmp_path / "out" / n, weights_only=True)["step"] for n in names if (tmp_path / "out" / n).exists()
    ]
    assert steps == [9, 8, 6][:keep]


@pytest.mark.parametrize("damage", ["truncated", "one byte"])
def test_a_damaged_save_of_an_evaluation_gives_way_to_the_one_before(corpus, tmp_path, capsys, damage):
    settings = dict(upstream="fbank", data=corpus, lexicon=corpus / "lexicon.txt", steps=6, eval_every=2)
    settings |= dict(batch_size=8, workers=0)
    on_cpu(evaluate_pr, flags_of(settings | dict(out=tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    os.remove(tmp_path / "out" / "result.json")
    spoil(tmp_path / "out" / "last.pt", damage, None)
    capsys.readouterr()
    on_cpu(evaluate_pr, flags_of(settings | dict(out=tmp_path / "out")))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "last.pt: damaged" in captured.err and "last.1.pt, step 6" in captured.err
    found, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("out", "whole"))
    assert {**found, "seconds": 0, "settings": 0} == {**expected, "seconds": 0, "settings": 0}


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True], ids=["new run", "resumed run"])
def test_a_folder_that_cannot_be_written_is_said_so(job, whole, tmp_path, started):
    out = tmp_path / "out"
    shutil.copytree(whole, out) if started else out.mkdir()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.chmod(0o555)
    try:
        command = [sys.executable, str(ROOT / "train.py"), *flags(job, out)]
        started = dict(env=environment(), capture_output=True, text=True, timeout=120)
        done = subprocess.run(command, cwd=job, preexec_fn=obey_permissions, **started)
    finally:
        out.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ermission" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


MUTATIONS = ["truncated", "flipped", "header", "empty", "one sample", "nan", "infinite", "8 channels", "192 kHz"]


def mutate(path, how, rng):
    """Writes one more broken or odd file beside good ones."""
    sound = 0.1 * np.random.default_rng(rng.randrange(10**9)).standard_normal(rng.randrange(500, 6000))
    if how in ("nan", "infinite"):
        path = path.with_suffix(".wav")
        sound[rng.randrange(len(sound))] = np.nan if how == "nan" else np.inf
        soundfile.write(path, sound, 16000, subtype="FLOAT")
    elif how == "8 channels":
        soundfile.write(path, np.repeat(sound[:, None], 8, axis=1), 16000)
    else:
        soundfile.write(path, sound[:1] if how == "one sample" else sound, 192000 if how == "192 kHz" else 16000)
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


@pytest.mark.parametrize("count", [90, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_audio_is_used_or_left_out_by_name_and_never_spoils_a_batch(tmp_path, monkeypatch, count):
    rng = random.Random(count)
    for number in range(count):
        ending = rng.choice([".flac", ".wav", ".ogg"])
        mutate(tmp_path / f"{number:04d}{ending}", MUTATIONS[number % len(MUTATIONS)], rng)
    monkeypatch.setattr(data, "check_left_out", lambda *_: None)  # more than 1% is what this is about
    corpus = data.find_corpus(str(tmp_path), ["."])
    batches, seen, left_out = data.Batches(corpus, 1, 3200), set(), dict(corpus.left_out)
    for batch in data.load_batches(batches, 0, len(corpus), workers=1):
        assert batch["waveforms"].isfinite().all()
        seen |= set(batch["paths"])
        left_out |= batch["left_out"]
    assert {path.name for path in tmp_path.iterdir()} == seen | left_out.keys()
    assert all(left_out.values()) and count / 4 < len(left_out) < count  # 8 channels and 192 kHz can be used


def test_a_file_deleted_or_replaced_after_the_scan_is_left_out_by_name(tmp_path):
    paths = write_audio(tmp_path, [6000] * 8)
    corpus = data.find_corpus(str(tmp_path), ["."])
    paths[1].unlink()
    write_audio(tmp_path / "other", [6400])
    os.replace(tmp_path / "other" / "000.flac", paths[2])
    (batch,) = data.load_batches(data.Batches(corpus, 8, 3200), 0, 1)
    assert (
        set(batch["left_out"]) == {"001.flac", "002.flac"}
        and "6400 samples, 6000 before" in batch["left_out"]["002.flac"]
    )
    silent = [path for path, waveform in zip(batch["paths"], batch["waveforms"]) if not waveform.any()]
    assert set(silent) == {"001.flac", "002.flac"} and len(set(batch["paths"])) == 8


def test_paths_with_spaces_other_alphabets_and_links_work(job, tmp_path):
    folder = tmp_path / "mein Gerät" / "звук"
    write_audio(folder / "a b", [6000 + 400 * i for i in range(4)])
    (tmp_path / "far").mkdir()
    write_audio(tmp_path / "far" / "deep", [7000] * 4, seed=1)
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "a b" / "ünï.flac").symlink_to(tmp_path / "far" / "deep" / "000.flac")
    out = tmp_path / "mein Gerät" / "läuft"
    shutil.copy(job / "hubert.pt", folder / "my teacher.pt")
    distil(job, out, data=folder, splits="a b,link", teachers=folder / "my teacher.pt", steps=2)
    assert load_student(out / "student.pt").head_names == ["layer2", "layer4"]
    assert len(data.find_corpus(str(folder), ["a b", "link"])) == 9


@pytest.mark.parametrize("kind", ["absolute", "above", "CRLF"])
def test_odd_manifests_work(job, tmp_path, kind):
    paths = write_audio(tmp_path / "audio", [6000] * 8)
    names = {"absolute": map(str, paths), "above": (f"../audio/{path.name}" for path in paths)}
    end = "\r\n" if kind == "CRLF" else "\n"
    (tmp_path / "lists").mkdir()
    root = tmp_path / "audio" if kind == "CRLF" else tmp_path / "lists"
    lines = [str(root), *(f"{name}\t6000" for name in names.get(kind, (path.name for path in paths)))]
    (tmp_path / "train.tsv").write_bytes(end.join([*lines, ""]).encode())
    distil(job, tmp_path / "out", data=tmp_path / "train.tsv", steps=2)
    assert metrics(tmp_path / "out")[-1]["left_out"] == 0


FORMS = ["fairseq", "fairseq before torch 1.6", "s3prl", "microsoft", "torchaudio", "transformers", "student"]


def write_checkpoint(folder, form):
    """(path of the file to mutate, the function that loads it, whether every byte of it is under a checksum)."""
    folder.mkdir(exist_ok=True)
    path = folder / "whole.pt"
    if form == "student":
        torch.manual_seed(0)
        save_student(Student(student_config(SMALL), [("layer2", 48)]), path)
        return path, load_student, True
    if form == "transformers":
        write_transformers(Student(student_config(SMALL), [("layer2", 48)]), folder / "hf")
        return folder / "hf" / "model.safetensors", lambda file: load_teacher(file.parent), False
    if form == "torchaudio":
        sizes = dict(extractor_mode="group_norm", extractor_conv_layer_config=list(SMALL.conv_layers))
        sizes |= dict(extractor_conv_bias=False, encoder_embed_dim=48, encoder_pos_conv_kernel=32, aux_num_out=None)
        sizes |= dict(
            encoder_pos_conv_groups=4, encoder_num_layers=4, encoder_num_heads=4, encoder_ff_interm_features=96
        )
        dropouts = ["projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop"]
        sizes |= {f"encoder_{name}": 0.0 for name in dropouts} | {"encoder_layer_norm_first": False}
        torch.save(torchaudio.models.wav2vec2_model(**sizes).state_dict(), path)
        return path, load_teacher, True
    save_official(random_encoder(0, relative_buckets=320 if form == "microsoft" else 0), path, form.split()[0])
    if form.endswith("1.6"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path, load_teacher, not form.endswith("1.6")


def without_checksum(path):
    """How many bytes of a file stand before its tensors: changed numbers go unnoticed where nothing sums them up."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return 8 + int.from_bytes(file.read(8), "little")
        for _ in range(5):
            for _ in pickletools.genops(file):
                pass
        return file.tell()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_mutated_checkpoint_loads_as_the_whole_one_or_is_refused_in_one_line(tmp_path, capsys, form, count):
    path, load, summed = write_checkpoint(tmp_path / "it", form)
    whole, expected = path.read_bytes(), load(path).state_dict()
    edge = len(whole) if summed else without_checksum(path)
    rng, refused = random.Random(count), 0
    for number in range(count):
        content = bytearray(whole)
        how = ["truncated", "bit", "bytes", "zeros", "moved"][number % 5]
        at = rng.randrange(edge)
        if how == "truncated":
            content = content[: rng.randrange(len(whole))]
        elif how == "bit":
            content[at] ^= 1 << rng.randrange(8)
        elif how == "bytes":
            content[at : at + 16] = rng.randbytes(len(content[at : at + 16]))
        elif how == "zeros":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        else:
            del content[at : at + rng.randrange(1, 9)]
        path.write_bytes(content)
        try:
            found = load(path).state_dict()
        except (OSError, ValueError) as error:
            refused += 1
            assert "\n" not in str(error) and str(path.parent if form == "transformers" else path) in str(error), str(
                error
            )
            continue
        if form != "fairseq before torch 1.6":  # its settings are under no checksum either
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), (number, how, at)
    assert refused > count / 3


class Reduce:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Build(Reduce):
    """Asks for code when its state is set."""

    def __reduce__(self):
        return dataclasses.make_dataclass, ("x", []), {"y": Reduce(self.path)}


ATTACKS = {
    "reduce": lambda path: {"model": {}, "cfg": {}, "extra": Reduce(path)},
    "build": lambda path: {"model": {}, "cfg": {}, "extra": Build(path)},
    "nested": lambda path: {"model": {"a": [({"b": Reduce(path)},)]}, "cfg": {}},
    "alone": Reduce,
}


@pytest.mark.parametrize("container", ["zip", "before torch 1.6", "tar", "bare"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_pickle_runs_code_whatever_it_is_wrapped_in(job, tmp_path, capsys, attack, container):
    canary, path = tmp_path / "canary", tmp_path / "attack.pt"
    evil = ATTACKS[attack](canary)
    if container == "tar":  # before torch 0.2
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                content = pickle.dumps(evil)
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    elif container == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=container == "zip")
    for load in (load_teacher, load_student):
        with pytest.raises(ValueError, match="attack.pt"):
            load(path)
    (tmp_path / "out").mkdir()
    shutil.copy(path, tmp_path / "out" / "last.pt")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"settings": {}}))
    assert "damaged" in refusal(capsys, job, tmp_path / "out")
    assert "attack.pt" in refusal(capsys, job, tmp_path / "new", teachers=path)
    assert not canary.exists()


def test_a_teacher_that_gives_no_number_for_one_batch_stops_the_run(job, whole, tmp_path, capsys, monkeypatch):
    forward, calls = SpeechEncoder.forward, []

    def sick(self, waveforms, lengths=None, layers=None):
        states = forward(self, waveforms, lengths, layers)
        calls.append(1)
        return (
            [state * float("inf") for state in states] if len(calls) == 3 * 4 + 1 else states
        )  # step 5's first teacher

    monkeypatch.setattr(SpeechEncoder, "forward", sick)
    line = refusal(capsys, job, tmp_path / "out")
    assert "step 5:" in line and line.count(".flac") == 8 and "saved after step 4" in line
    monkeypatch.undo()
    assert state(tmp_path / "out")["step"] == 4
    distil(job, tmp_path / "out")
    assert_same_run(state(tmp_path / "out"), state(whole))


@pytest.mark.slow
def test_memory_does_not_grow_over_5000_steps(job):
    process = start(job, job / "long", steps=5000, save_every=500, workers=1)
    used = {}
    for line in process.stdout:
        if line.startswith("step "):
            with open(f"/proc/{process.pid}/statm") as file:
                used[int(line.split()[1].split("/")[0])] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert process.wait() == 0
    first, last = (np.mean([used[step] for step in used if low < step <= low + 1000]) for low in (0, 4000))
    assert last < 1.01 * first, (first, last)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_start_without_a_warning_and_help_comes_soon(program, tmp_path):
    if program in MODULES:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", f"import {program[:-3]}"], cwd=ROOT, env=environment(), check=True
        )
        return
    command, seconds = [sys.executable, "-W", "error", str(ROOT / program), "--help"], []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0 and done.stderr == "" and "usage:" in done.stdout
    assert min(seconds) < 3
    assert not list(tmp_path.iterdir())
