"""train.py as a user runs it: alone, under torchrun, and on two agents."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
from conftest import (
    ROOT,
    environment,
    flags,
    metrics,
    noise,
    on_cpu,
    random_encoder,
    refused,
    run,
    write_audio,
)

import aggregate
import cache
import data
import manifest
import train
from encoder import SpeechEncoder
from export import official_state_dict, save_official
from run import Run
from student import Student, load_student, save_student, student_config


def distil(job, out, processes=None, **more):
    """Weights of the student of a whole run, in this process if it is one: that is faster."""
    out = job / out
    if processes is None:
        on_cpu(train, flags(job, out, **more))
    else:
        done = run("train.py", *flags(job, out, **more), cwd=job, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return load_student(out / "student.pt").state_dict()


def assert_same_student(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), name


def assert_equal_student(a, b):
    assert_same_student(a, b, 0)


def refusal(capsys, arguments):
    return refused(capsys, train, arguments)


@pytest.fixture(scope="session")
def reference(job):
    """The student of 20 steps of one process."""
    return distil(job, "one")


# ------------------------------------------------------------------ processes


@pytest.mark.parametrize(
    "processes, accumulate", [(2, 1), (None, 2), pytest.param(2, 4, marks=pytest.mark.slow)]
)
def test_processes_and_accumulation_give_the_student_of_one_process(
    job, reference, processes, accumulate
):
    out = f"p{processes}a{accumulate}"
    assert_same_student(distil(job, out, processes, accumulate=accumulate), reference)
    for a, b in zip(metrics(job / out), metrics(job / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_agents_give_the_student_of_one(job, reference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    command += ["--local_addr=127.0.0.1", str(ROOT / "train.py"), *flags(job, "agents")]
    agents = [subprocess.Popen(command, cwd=job, env=environment()) for _ in range(2)]
    try:
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert_same_student(load_student(job / "agents").state_dict(), reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_losses_of_the_cpu(job, reference):
    done = run("train.py", *flags(job, "gpu"), cwd=job, processes=1, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr
    for a, b in zip(metrics(job / "gpu"), metrics(job / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_with_dropout_accumulation_changes_the_student_no_more_than_another_seed(job):
    changes = [{}, {"seed": 1}, {"accumulate": 2}]
    whole, seed, other = (
        distil(job, f"dropout{i}", dropout=0.1, **change) for i, change in enumerate(changes)
    )

    def distance(a, b):
        return sum(float((a[name] - b[name]).norm()) for name in a)

    assert 0 < distance(whole, other) < distance(whole, seed)


# ------------------------------------------------------------------ cached targets


@pytest.mark.parametrize("processes", [None, 2])
def test_cached_targets_give_the_student_of_teachers_that_run_at_every_step(job, processes):
    audio = job / "whole audio"  # every crop is a whole utterance
    if not audio.exists():
        write_audio(audio, [6400] * 24, seed=3)
    settings = {"data": audio, "max_seconds": 1}
    expected = distil(job, f"uncached{processes}", **settings)
    cached = distil(job, f"cached{processes}", processes, cache=job / f"c{processes}", **settings)
    assert_same_student(cached, expected, 5e-2)
    assert not all(torch.equal(cached[name], weight) for name, weight in expected.items())
    out, plain = metrics(job / f"cached{processes}"), metrics(job / f"uncached{processes}")
    for a, b in zip(out, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def count_teacher_calls(monkeypatch):
    forward, calls = SpeechEncoder.forward, []

    def counted(self, *args, **keywords):
        if not self.training:
            calls.append(1)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(SpeechEncoder, "forward", counted)
    return calls


def test_targets_are_cached_per_ensemble_and_code_and_used_again(job, tmp_path, monkeypatch):
    cache, calls = tmp_path / "cache", count_teacher_calls(monkeypatch)
    distil(job, tmp_path / "first", cache=cache, steps=2)
    files = list(cache.rglob("*.pt"))
    assert len(calls) == 3 * len(files) > 3 * 30
    assert {path.relative_to(next(cache.iterdir())).parts[0] for path in files} >= {"telephone"}
    calls.clear()
    distil(job, tmp_path / "second", cache=cache, steps=3, student_layers=1, seed=5)
    assert not calls
    others = [{"heads": "1,4"}, {"agg": "concat"}, {"teachers": job / "hubert.pt"}]
    for number, other in enumerate(others, start=2):
        distil(job, tmp_path / f"other{number}", cache=cache, steps=1, **other)
        assert len(list(cache.iterdir())) == number
    source = train.inspect.getsource
    monkeypatch.setattr(train.inspect, "getsource", lambda part: source(part) + "# edited")
    distil(job, tmp_path / "edited", cache=cache, steps=1)
    assert len(list(cache.iterdir())) == 5


def test_content_decides_about_cached_targets_not_times_or_folders(
    job, tmp_path, capsys, monkeypatch
):
    shutil.copytree(job / "audio", tmp_path / "audio")
    settings = {"data": tmp_path / "audio", "cache": tmp_path / "cache", "steps": 1}
    distil(job, tmp_path / "first", **settings)
    calls = count_teacher_calls(monkeypatch)
    shutil.copytree(tmp_path / "audio", tmp_path / "copy", copy_function=shutil.copy)
    distil(job, tmp_path / "second", **settings | {"data": tmp_path / "copy"})
    assert not calls
    other = write_audio(tmp_path / "other", [6000 + 397 * i for i in range(4)], seed=8)
    os.replace(other[3], tmp_path / "copy" / "003.flac")  # other audio of the same length
    changed = settings | {"data": tmp_path / "copy"}
    line = refusal(capsys, flags(job, tmp_path / "third", **changed))
    assert "003.flac.0-7191.pt was computed from other audio than 003.flac; delete it" in line
    next((tmp_path / "cache").rglob("003.flac*.pt")).unlink()
    distil(job, tmp_path / "third", **changed)
    assert len(calls) == 3


def test_a_damaged_target_counts_as_an_unreadable_utterance(job, tmp_path, capsys, monkeypatch):
    write_audio(tmp_path / "audio", [6400] * 120)
    settings = {"data": tmp_path / "audio", "cache": tmp_path / "cache", "steps": 15}
    distil(job, tmp_path / "whole", **settings)
    damaged = next((tmp_path / "cache").rglob("007.flac*.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    distil(job, tmp_path / "damaged", **settings)
    warnings = capsys.readouterr().err
    assert warnings.count("skipped 007.flac") == warnings.count("\n") == 1
    calls = count_teacher_calls(monkeypatch)
    distil(job, tmp_path / "next", **settings)  # computes it again
    assert len(calls) == 3 and not capsys.readouterr().err


def test_a_disk_without_room_is_an_error_before_the_teachers_run(
    job, tmp_path, capsys, monkeypatch
):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    calls = count_teacher_calls(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    line = refusal(capsys, flags(job, tmp_path / "out", cache=tmp_path / "cache"))
    assert "GB free; choose another folder" in line and not calls


def test_targets_of_other_frames_are_not_cached(job, tmp_path, capsys):
    convolutions = ((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),)  # 160 samples per frame
    teacher = random_encoder(0, conv_layers=convolutions)
    save_official(teacher, tmp_path / "fast.pt", "fairseq")
    settings = {"teachers": tmp_path / "fast.pt", "steps": 1}
    line = refusal(capsys, flags(job, tmp_path / "out", cache=tmp_path / "cache", **settings))
    assert "--cache" in line and "320 samples" in line
    distil(job, tmp_path / "out", **settings)


def test_targets_that_are_not_finite_are_not_cached(job, tmp_path, monkeypatch):
    average = aggregate.average
    infinite = lambda states: [target * float("inf") for target in average(states)]  # noqa: E731
    monkeypatch.setitem(aggregate.AGGREGATIONS, "infinite", infinite)
    with pytest.raises(RuntimeError, match="000.flac: the teachers' states are not finite"):
        distil(job, tmp_path / "out", agg="infinite", cache=tmp_path / "cache", steps=1)
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_cached_targets_of_an_older_version_would_be_noticed():
    """If a number below changes, raise cache.VERSION: cached targets no longer fit the code."""
    assert cache.VERSION == 1
    encoder = random_encoder(5, relative_buckets=320)
    waveform = torch.sin(torch.arange(4000.0) ** 1.3)[None] / 10
    with torch.no_grad():
        state = encoder(waveform, layers=[3])[0][0]
    saved = cache.quantize(state)
    found = [float(state.square().mean()), float(state[3, 7]), float(state[11, 40])]
    assert found == pytest.approx([1.02108, -0.03428, -0.75951], abs=1e-4)
    assert saved["values"].sum(0)[:6].tolist() == pytest.approx(
        [154, 269, 96, -302, -528, 92], abs=2
    )


# ------------------------------------------------------------------ what a run writes


def test_metrics_have_every_heads_terms_and_add_up(job, reference):
    lines = metrics(job / "one")
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1"] + line["cosine"], rel=1e-6)
        mean = (line["l1/layer2"] + line["l1/layer4"]) / 2
        assert line["l1"] == pytest.approx(mean, rel=1e-6) and "cosine/layer4" in line
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    config = json.loads((job / "one" / "config.json").read_text())
    assert config["heads"] == ["layer2", "layer4"] and config["settings"]["steps"] == 20
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?|not recorded", config["commit"])
    listed = (job / "one" / "manifest.tsv").read_text().splitlines()
    assert listed[0] == str(job / "audio") and listed[1].split("\t")[1:] == ["6000"]


@pytest.mark.parametrize("agg", ["avg", "concat", "none"])
def test_each_aggregation_trains_its_heads_and_the_loss_falls(job, agg):
    second = "wavlm" if agg == "avg" else "wavlm_large"
    distil(job, agg, agg=agg, teachers=f"{job}/hubert.pt,{job}/{second}.pt", steps=12)
    student, lines = load_student(job / agg), metrics(job / agg)
    expected = {
        "avg": {"layer2": 48, "layer4": 48},
        "concat": {"layer2": 112, "layer4": 112},
        "none": {
            "hubert.layer2": 48,
            "hubert.layer4": 48,
            "wavlm_large.layer2": 64,
            "wavlm_large.layer4": 64,
        },
    }[agg]
    widths = [prediction.shape[-1] for prediction in student(noise(1, 4000))]
    assert dict(zip(student.head_names, widths)) == expected
    assert [tuple(x.shape) for x in student.hidden_states(noise(1, 4000))] == [(1, 12, 48)] * 3
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_teachers_may_have_layers_of_their_choice(job):
    distil(job, "depths", heads="2,4/2,3/1,4", steps=2)
    assert load_student(job / "depths").head_names == ["layer2-2-1", "layer4-3-4"]
    distil(job, "depths", heads="2,4/2,3/1,4", steps=2)  # resumed


def test_bf16_and_a_student_from_random_weights_train_too(job):
    settings = {"precision": "bf16", "init": "none", "student_layers": 3, "dropout": 0.1}
    weights = distil(job, "bf16", steps=12, **settings)
    lines = metrics(job / "bf16")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_noise_is_mixed_into_the_students_input_alone(job, tmp_path):
    write_audio(tmp_path / "noise", [5000, 3000], seed=9)
    write_audio(tmp_path / "audio", [6400] * 24, seed=3)
    settings = {"data": tmp_path / "audio", "max_seconds": 1, "steps": 10}
    noise = {"noise": tmp_path / "noise", "snr": "0,5", "noise_probability": 1}
    clean = distil(job, tmp_path / "clean", **settings)
    noisy = distil(job, tmp_path / "noisy", **settings, **noise)
    cached = distil(job, tmp_path / "cached", cache=tmp_path / "cache", **settings, **noise)
    assert_same_student(cached, noisy, 5e-2)
    name = "encoder.layers.0.ffn_in.weight"
    assert (noisy[name] - clean[name]).norm() > 10 * (noisy[name] - cached[name]).norm()


def test_other_noise_is_refused_on_resume_and_a_moved_folder_is_not(job, tmp_path, capsys):
    write_audio(tmp_path / "noise", [5000, 3000], seed=9)
    write_audio(tmp_path / "audio", [6400] * 24, seed=3)
    settings = {"data": tmp_path / "audio", "max_seconds": 1, "steps": 1}
    distil(job, tmp_path / "out", noise=tmp_path / "noise", **settings)
    (tmp_path / "noise").rename(tmp_path / "moved")
    distil(job, tmp_path / "out", noise=tmp_path / "moved", **settings)
    write_audio(tmp_path / "moved" / "more", [4000])
    for other in ({"noise": tmp_path / "moved"}, {}):
        line = refusal(capsys, flags(job, tmp_path / "out", **settings, **other))
        assert "holds another run (files of noise changed" in line


def test_a_student_of_another_width_has_the_teachers_convolutions(job):
    weights = distil(job, "thin", student_dim=32, student_layers=5, steps=12)
    student, lines = load_student(job / "thin"), metrics(job / "thin")
    assert [tuple(x.shape) for x in student.hidden_states(noise(1, 4000))] == [(1, 12, 32)] * 6
    assert [prediction.shape[-1] for prediction in student(noise(1, 4000))] == [48, 48]
    assert lines[-1]["loss"] < lines[0]["loss"]
    start = distil(job, "thin at first", student_dim=32, student_layers=5, steps=0)
    convolution = "encoder.feature_extractor.convs.3.weight"
    teacher = random_encoder(0).state_dict()["feature_extractor.convs.3.weight"]
    assert torch.equal(start[convolution], teacher)
    assert not torch.equal(weights[convolution], teacher)


def test_zero_steps_save_the_student_as_it_begins(job, tmp_path):
    weights = distil(job, tmp_path / "out", steps=0)
    teacher = random_encoder(0).state_dict()
    common = [name for name in teacher if f"encoder.{name}" in weights]
    assert len(common) > 20
    for name in common:
        assert torch.equal(weights[f"encoder.{name}"], teacher[name]), name


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_on_held_out_audio_is_the_same_on_two_processes(job, tmp_path, cached):
    write_audio(tmp_path / "audio" / "train", [6400] * 24, seed=3)
    write_audio(tmp_path / "audio" / "valid", [7000 + 100 * i for i in range(21)], seed=4)
    settings = {"data": tmp_path / "audio", "splits": "train", "max_seconds": 1, "dropout": 0.3}
    settings |= {"valid": "valid", "valid_every": 8, "log_every": 3, "steps": 20}
    if cached:
        settings["cache"] = tmp_path / "cache"
    distil(job, tmp_path / "two", 2, **settings, lr=0, accumulate=2)  # fills the cache: 11 and 10
    distil(job, tmp_path / "one", **settings, lr=0)
    lines = [line for line in metrics(tmp_path / "one") if "valid" in line]
    assert [line["step"] for line in lines] == [8, 16, 20]
    losses = [line["valid"] for line in lines]
    assert losses[0] == losses[1] == losses[2]  # a rate of 0; no dropout, the same crops
    assert lines[0]["valid"] == pytest.approx(lines[0]["valid_l1"] + lines[0]["valid_cosine"])
    other = [line["valid"] for line in metrics(tmp_path / "two") if "valid" in line]
    assert other == pytest.approx(losses, rel=1e-5)
    distil(job, tmp_path / "learns", **settings)
    learned = [line["valid"] for line in metrics(tmp_path / "learns") if "valid" in line]
    assert learned[-1] < learned[0] < losses[0]
    if cached:
        assert len(list((tmp_path / "cache").rglob("*.pt"))) == 24 + 21


def test_damaged_held_out_audio_is_warned_of_once(job, tmp_path, capsys):
    write_audio(tmp_path / "audio" / "train", [6400] * 16, seed=3)
    (damaged, *_) = write_audio(tmp_path / "audio" / "valid", [6400] * 16, seed=4)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    settings = {"data": tmp_path / "audio", "splits": "train", "max_seconds": 1, "steps": 4}
    distil(job, tmp_path / "out", **settings, valid="valid", valid_every=2)
    printed = capsys.readouterr()
    assert printed.out.count("  valid ") == 2
    assert printed.err.count(f"warning: skipped valid/{damaged.name}: ") == 1


def test_held_out_audio_that_is_gone_is_warned_of_and_training_goes_on(
    job, tmp_path, monkeypatch, capsys
):
    write_audio(tmp_path / "audio" / "train", [6400] * 16, seed=3)
    gone = write_audio(tmp_path / "audio" / "valid", [6400] * 16, seed=4)
    after_step = Run.after_step

    def after_step_and_remove(self, step, *rest):
        after_step(self, step, *rest)
        if step == 2:
            for path in gone:
                path.unlink()

    monkeypatch.setattr(Run, "after_step", after_step_and_remove)
    settings = {"data": tmp_path / "audio", "splits": "train", "max_seconds": 1, "steps": 4}
    distil(job, tmp_path / "out", **settings, valid="valid", valid_every=2)
    warning = "warning: step 4 has no held-out loss: "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if warning in line]
    assert "valid/0" in line
    lines = [line["step"] for line in metrics(tmp_path / "out") if "valid" in line]
    assert lines == [2] and metrics(tmp_path / "out")[-1]["step"] == 4


def test_a_signal_during_validation_ends_it_and_the_step_is_saved(job, tmp_path, monkeypatch):
    write_audio(tmp_path / "audio" / "train", [6400] * 16, seed=3)
    write_audio(tmp_path / "audio" / "valid", [6400] * 32, seed=4)
    crop, crops = data.TrainBatches.crop, []

    def crop_and_signal(self, i, *place):
        if self.corpus.path(i).startswith("valid"):
            crops.append(i)
            os.kill(os.getpid(), signal.SIGTERM)
        return crop(self, i, *place)

    monkeypatch.setattr(data.TrainBatches, "crop", crop_and_signal)
    settings = {"data": tmp_path / "audio", "splits": "train", "max_seconds": 1, "steps": 20}
    with pytest.raises(SystemExit):
        distil(job, tmp_path / "out", **settings, valid="valid", valid_every=3)
    assert len(crops) == 8 and metrics(tmp_path / "out")[-1]["step"] == 3
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 3


def test_held_out_audio_of_a_manifest_with_absolute_paths_is_found_in_it(job, tmp_path, capsys):
    (path, *_) = write_audio(tmp_path / "audio" / "valid", [6400] * 16)
    (tmp_path / "list.tsv").write_text(f"{tmp_path}/audio\n{path}\t6400\n")
    settings = {"data": tmp_path / "list.tsv", "valid": "valid", "batch_size": 1}
    line = refused(capsys, train, flags(job, tmp_path / "out", **settings))
    assert f"{path} is in the training audio too" in line
    before = (tmp_path / "out/manifest.tsv").read_text()
    settings = {"data": tmp_path / "out/manifest.tsv", "batch_size": 1}
    line = refused(capsys, train, flags(job, tmp_path / "out", **settings))
    assert "manifest.tsv: would be overwritten; choose another --out" in line
    assert (tmp_path / "out/manifest.tsv").read_text() == before


def test_without_clipping_the_gradient_is_used_as_it_is(job, reference):
    weights = distil(job, "unclipped", clip=0)
    assert_equal_student(weights, reference)  # whose gradients are below the limit
    limited = distil(job, "clipped", clip=1e-4)
    name = "encoder.layers.0.ffn_in.weight"
    assert not torch.equal(limited[name], weights[name])


@pytest.mark.parametrize("lost", [1, 2])
def test_unreadable_files_are_replaced_and_named_and_over_one_percent_is_an_error(
    job, tmp_path, capsys, monkeypatch, lost
):
    paths = write_audio(tmp_path / "audio", [6000] * 120)
    write = manifest.write_manifest

    def deleted_afterwards(*args):
        write(*args)
        for path in paths[:lost]:
            path.unlink()

    monkeypatch.setattr(manifest, "write_manifest", deleted_afterwards)
    settings = {"data": tmp_path / "audio", "log_every": 1, "steps": 30}
    if lost == 2:
        with pytest.raises(SystemExit):
            distil(job, tmp_path / "out", **settings, save_every=1000)
        line = capsys.readouterr().err.splitlines()[-1]
        step = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"]
        assert "2 of 120 audio files cannot be used, over 1%: 000.flac" in line
        assert line.endswith(f"; step {step} is saved")
        assert step == 1 + metrics(tmp_path / "out")[-1]["step"]
        return
    distil(job, tmp_path / "out", **settings)
    assert capsys.readouterr().err.count("skipped 000.flac") == 1
    assert all(line["loss"] > 0.1 for line in metrics(tmp_path / "out"))


def test_the_learning_rate_rises_linearly_and_decays_linearly_to_zero():
    args = train.parse(["--steps", "1000", "--lr", "1e-3", "--warmup", "0.07"])
    rates = [train.learning_rate(step, args) for step in range(1, 1002)]
    assert rates[0] == pytest.approx(1e-3 / 70) and max(rates) == rates[69] == 1e-3
    assert rates[-1] == 0 and rates[999] > 0
    differences = [b - a for a, b in zip(rates, rates[1:])]
    assert all(d == pytest.approx(1e-3 / 70) for d in differences[:69])
    assert all(d == pytest.approx(-1e-3 / 931) for d in differences[69:])


def test_the_defaults_are_the_papers_recipe():
    args = vars(train.parse([]))
    expected = {"agg": "avg", "layers": [4, 8, 12], "student_layers": 2, "init": "first"}
    expected |= {"dropout": 0.1, "steps": 200_000, "batch_size": 24, "lr": 2e-4, "warmup": 0.07}
    expected |= {"clip": 5.0, "cosine_weight": 1.0, "out": "runs/avg", "data": "data/LibriSpeech"}
    expected |= {"teachers": ["hubert", "robust_hubert", "wavlm_plus"], "max_seconds": 15.625}
    expected |= {"splits": list(manifest.LIBRISPEECH_960)}
    assert {name: args[name] for name in expected} == expected


# ------------------------------------------------------------------ resuming


def test_a_finished_run_is_not_changed_from_any_directory(job, reference, tmp_path, capsys):
    before = (job / "one" / "last.pt").read_bytes()
    on_cpu(train, flags(job, job / "one"))
    assert "step 20 of 20" in capsys.readouterr().out
    assert (job / "one" / "last.pt").read_bytes() == before
    shutil.copytree(job / "one", tmp_path / "moved")
    os.remove(tmp_path / "moved" / "student.pt")
    names = ("hubert", "robust", "wavlm")
    teachers = ",".join(f"./{name}.pt" for name in names)
    here = flags(job, tmp_path / "moved", data="audio", teachers=teachers)
    done = run("train.py", *here, cwd=job)
    assert done.returncode == 0, done.stderr
    assert_equal_student(load_student(tmp_path / "moved").state_dict(), reference)


def test_other_settings_and_teachers_are_refused_on_resume(job, reference, tmp_path, capsys):
    line = refusal(capsys, flags(job, job / "one", heads="2,3", lr=2e-3))
    assert "--heads was [[2, 4], [2, 4], [2, 4]], is [[2, 3], [2, 3], [2, 3]]" in line
    assert "--lr was 0.001, is 0.002" in line
    assert "--steps" not in line
    shutil.copytree(job / "one", tmp_path / "out")
    for name in ("hubert", "robust", "wavlm"):
        shutil.copy(job / f"{name}.pt", tmp_path)
    save_official(random_encoder(7), tmp_path / "hubert.pt", "fairseq")
    teachers = ",".join(f"{tmp_path}/{name}.pt" for name in ("hubert", "robust", "wavlm"))
    line = refusal(capsys, flags(job, tmp_path / "out", teachers=teachers))
    assert "holds another run (weights of teacher 1 changed)" in line
    for names in ("hubert,robust", "robust,hubert,wavlm"):  # another average; another order
        teachers = ",".join(f"{job}/{name}.pt" for name in names.split(","))
        line = refusal(capsys, flags(job, tmp_path / "out", teachers=teachers))
        assert "--teachers was ['hubert', 'robust', 'wavlm']" in line


@pytest.mark.parametrize("cached", [False, True])
def test_an_edited_aggregation_is_refused_on_resume(job, tmp_path, capsys, monkeypatch, cached):
    more = {"steps": 2} | ({"cache": tmp_path / "cache"} if cached else {})
    distil(job, tmp_path / "out", **more)
    source = train.inspect.getsource
    monkeypatch.setattr(train.inspect, "getsource", lambda part: source(part) + "# edited")
    line = refusal(capsys, flags(job, tmp_path / "out", **more))
    assert "holds another run (source of the aggregation changed)" in line
    monkeypatch.undo()
    mean = torch.Tensor.mean  # as a constant or function that the aggregation uses
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "mean", lambda x, *dims: 2 * mean(x, *dims))
        line = refusal(capsys, flags(job, tmp_path / "out", **more))
    assert "holds another run (results of the aggregation changed)" in line


def test_all_differences_from_the_run_before_are_listed(job, tmp_path, capsys):
    distil(job, tmp_path / "out", steps=1)
    other = {"teachers": f"{job}/robust.pt,{job}/wavlm.pt", "lr": 2e-3, "steps": 1}
    line = refusal(capsys, flags(job, tmp_path / "out", **other))
    for name in ("--teachers was", "--lr was", "--heads was", "weights of teacher 1 changed"):
        assert name in line


def test_the_manifest_fixes_the_corpus_of_a_run(job, tmp_path, capsys, monkeypatch):
    write_audio(tmp_path / "audio", [6000] * 10)
    settings = {"data": tmp_path / "audio", "steps": 4}
    expected = distil(job, tmp_path / "whole", **settings)
    distil(job, tmp_path / "out", **settings, save_every=2)
    os.replace(tmp_path / "out" / "last.pt.old", tmp_path / "out" / "last.pt")
    write_audio(tmp_path / "audio" / "more", [6000])
    capsys.readouterr()
    resumed = distil(job, tmp_path / "out", **settings)
    assert_equal_student(resumed, expected)
    assert "1 new audio files are not in this run" in capsys.readouterr().err

    def unlisted(*_):
        raise PermissionError("a folder that the run does not need")

    monkeypatch.setattr(manifest, "list_audio", unlisted)
    assert_equal_student(distil(job, tmp_path / "out", **settings), expected)
    lines = (tmp_path / "out/manifest.tsv").read_text().splitlines()
    settings["data"] = tmp_path / "list.tsv"
    settings["data"].write_text("\n".join(lines))
    assert_equal_student(distil(job, tmp_path / "list", **settings), expected)
    os.replace(tmp_path / "audio", tmp_path / "moved")
    settings["data"].write_text("\n".join([str(tmp_path / "moved"), *lines[1:]]))
    assert_equal_student(distil(job, tmp_path / "list", **settings), expected)
    settings["data"].write_text("\n".join([str(tmp_path / "moved"), *lines[1:3], "", *lines[3:]]))
    distil(job, tmp_path / "list", **settings)
    settings["data"].write_text("\n".join(lines[:-1]))
    assert "lines of the manifest changed" in refusal(
        capsys, flags(job, tmp_path / "list", **settings)
    )
    settings["data"] = write_audio(tmp_path / "other" / "folder", [6000])[0].parent.parent
    assert "000.flac and others cannot be read in" in refusal(
        capsys, flags(job, tmp_path / "out", **settings)
    )


# ------------------------------------------------------------------ bad input


BAD_INPUT = [
    ({"data": "nowhere"}, ["nowhere", "no such folder"]),
    ({"splits": "train-clean-100"}, ["train-clean-100", "no such folder"]),
    ({"data": "{job}/empty"}, ["no audio", "empty"]),
    ({"teachers": "nowhere.pt"}, ["nowhere.pt", "hubert"]),
    ({"teachers": "{job}/short.pt"}, ["short.pt", "damaged"]),
    ({"teachers": "{job}/page.pt"}, ["page.pt", "damaged"]),
    ({"teachers": "{job}/code.pt"}, ["code.pt", "system"]),
    ({"teachers": "{job}/other.pt"}, ["other.pt", "not a HuBERT or WavLM"]),
    ({"teachers": "{job}/student.pt"}, ["student.pt", "export.py"]),
    ({"teachers": "{job}/missing.pt"}, ["missing.pt", "encoder.layers.1.fc1.weight"]),
    ({"teachers": ","}, ["--teachers"]),
    ({"seed": -1}, ["--seed", "of at least 0"]),
    ({"heads": "2,5"}, ["hubert", "4 layers"]),
    ({"heads": "2,4/2,4"}, ["2 lists", "3 teachers"]),
    ({"heads": "2,4/2,4/3"}, ["--heads"]),
    ({"heads": "2,4/2,4/3,5"}, ["wavlm", "4 layers"]),
    ({"heads": "2,2"}, ["--heads"]),
    ({"heads": "two"}, ["--heads", "two"]),
    ({"heads": "0,2"}, ["--heads"]),
    (
        {"teachers": "{job}/hubert.pt,{job}/wavlm_large.pt"},
        ["average", "hubert 48", "wavlm_large 64"],
    ),
    ({"agg": "mean"}, ["--agg", "mean"]),
    ({"batch_size": 9, "accumulate": 2}, ["--batch-size 9", "--accumulate 2"]),
    ({"batch_size": 64}, ["batch of 64", "utterances"]),
    ({"student_layers": 5}, ["of 5 layers", "random initial weights"]),
    ({"lr": "fast"}, ["--lr", "fast"]),
    ({"max_seconds": 0.01}, ["pieces of 0.01 s", "0.05"]),
    ({"max_seconds": "nan"}, ["--max-seconds", "at least 0"]),
    ({"weight_decay": -1}, ["--weight-decay", "at least 0"]),
    ({"lr": -1e-3}, ["--lr", "at least 0"]),
    ({"clip": "nan"}, ["--clip", "at least 0"]),
    ({"dropout": 2}, ["--dropout", "from 0 to 1"]),
    ({"warmup": 7}, ["--warmup", "from 0 to 1"]),
    ({"weights": "1,2,nan"}, ["--weights", "nan"]),
    ({"weights": "1,2"}, ["weights [1.0, 2.0]", "3 teachers"]),
    ({"weights": "1,2,1", "agg": "concat"}, ["--weights", "--agg avg"]),
    ({"valid": "telephone"}, ["--valid telephone", "training audio"]),
    ({"valid": "nowhere"}, ["nowhere", "no such folder"]),
    ({"out": "{job}/strange"}, ["strange", "last.pt"]),
]


@pytest.mark.parametrize("change, words", BAD_INPUT, ids=[str(change) for change, _ in BAD_INPUT])
def test_bad_input_is_one_line_before_training(job, capsys, change, words, tmp_path):
    if not (job / "strange").exists():
        write_bad_files(job)
    change = {key: str(value).format(job=job) for key, value in change.items()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        on_cpu(train, flags(job, **{"out": tmp_path / "out", **change}))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("train.py: ")
    assert all(word in lines[-1] for word in words), lines
    assert not any("Traceback" in line or "train.py" in line for line in lines[:-1])
    assert not (tmp_path / "out" / "config.json").exists()


def write_bad_files(job):
    (job / "empty").mkdir()
    (job / "strange").mkdir()
    (job / "strange" / "last.pt").write_text("a diary")
    whole = (job / "hubert.pt").read_bytes()
    (job / "short.pt").write_bytes(whole[: len(whole) // 3])
    (job / "page.pt").write_text("<html>Sign in</html>")
    torch.save({"model": {}, "cfg": os.system}, job / "code.pt")
    torch.save({"conv1.weight": torch.zeros(2)}, job / "other.pt")
    weights = official_state_dict(random_encoder(), "fairseq")
    del weights["encoder.layers.1.fc1.weight"]
    torch.save({"cfg": {"encoder_attention_heads": 4}, "model": weights}, job / "missing.pt")
    student = Student(student_config(random_encoder().config), [("layer2", 48)])
    save_student(student, job / "student.pt")


def test_under_torchrun_bad_input_on_one_rank_is_one_line(job, tmp_path):
    code = "import program\nprogram.init()\nprogram.join()\nwith program.one_line_errors():\n"
    code += "    if program.RANK == 1:\n        raise ValueError('only here')\n"
    (tmp_path / "other.py").write_text(code)
    done = run(tmp_path / "other.py", cwd=tmp_path, processes=2)
    assert done.returncode != 0 and done.stderr.count("other.py: only here") == 1
    done = run("train.py", *flags(job, tmp_path / "out", heads="2,7"), cwd=job, processes=2)
    assert done.stderr.count("train.py: ") == 1 and "7" in done.stderr
    assert f'{ROOT / "train.py"}", line' not in done.stderr  # no traceback
    code = "import program, train\nparse = train.parse\ndef parse_otherwise(*_):\n"
    code += "    args = parse()\n    args.lr *= 1 + program.RANK\n    return args\n"
    (tmp_path / "mixed.py").write_text(f"{code}train.parse = parse_otherwise\ntrain.main()\n")
    done = run(tmp_path / "mixed.py", *flags(job, tmp_path / "mixed"), cwd=job, processes=2)
    differ = f"mixed.py: {tmp_path}/mixed: the processes differ in settings or teachers; start all"
    assert done.stderr.count(differ) == 1


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        ({"start": 9}, "checkpoints; use a shared folder"),
        ({"precision": "bf16"}, "precision or device; use one kind"),
        ({"device": "cuda"}, "precision or device; use one kind"),
        ({"settings": {"--lr": 2}}, "settings or teachers; start all"),
        ({"log_every": 7}, "settings or teachers; start all"),
    ],
)
def test_processes_that_differ_are_refused(change, problem):
    def of_rank(start=0, precision="fp32", device="cpu", settings=None, log_every=100):
        args = train.parse(["--precision", precision, "--log-every", str(log_every)])
        run = types.SimpleNamespace(start=start, settings=settings or {"--lr": 1})
        return train.must_be_equal(args, run, torch.device(device))

    ranks = [of_rank(), of_rank(**change)]
    if problem is None:
        train.check_equal(train.parse([]), ranks)
        return
    with pytest.raises(ValueError, match=f"^runs/avg: the processes differ in {problem}"):
        train.check_equal(train.parse([]), ranks)


def test_help_documents_every_flag():
    done = run("train.py", "--help", cwd=ROOT)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for flag, default in [("--agg", "avg"), ("--steps", "200000"), ("--clip", "5.0")]:
        assert re.search(rf"{flag} .*?\(default: {default}", text), flag


def test_an_aggregation_of_a_readers_own_needs_one_function(job, tmp_path, monkeypatch):
    def first(states):
        return states[0]

    monkeypatch.setitem(aggregate.AGGREGATIONS, "first", first)
    distil(job, tmp_path / "out", agg="first", teachers=job / "hubert.pt", steps=2)
    assert load_student(tmp_path / "out").head_names == ["layer2", "layer4"]
