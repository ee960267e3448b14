"""probe.py: upstreams, hidden states and the training of probes, for phoneme recognition."""

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
import torchaudio
from conftest import command, environment, flags_of, noise, on_cpu, refused, run, write_audio
from pytest import approx

import evaluate_pr
from demo import speech
from superb import ctc, probe
from superb.upstream import FilterBanks, Upstream, free_memory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus in LibriSpeech's layout, smaller than that of the other tests."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {"train-clean-100": (24, 2, 1), "dev-clean": (8, 2, 1), "test-clean": (8, 2, 1)}
    speech.write_corpus(folder, splits=splits, decibels=(50, 50))
    return folder


def upstream(path):
    return Upstream(argparse.Namespace(upstream=str(path), precision="fp32"))


def flags(corpus, out, **more):
    settings = {"upstream": "fbank", "data": corpus, "lexicon": corpus / "lexicon.txt", "out": out}
    settings |= {"steps": 12, "batch_size": 8, "lr": 1e-2, "workers": 0, "eval_every": 4}
    return flags_of(settings | {"log_every": 1, "seed": 1} | more)


def score(corpus, out, **more):
    """result.json of a run in this process."""
    on_cpu(evaluate_pr, flags(corpus, out, **more))
    return json.loads((out / "result.json").read_text())


def comparable(folder):
    """What must be the same however a run came about: scores, curves, files of test."""
    result = json.loads((folder / "result.json").read_text())
    names = ("per", "interval", "best_step", "lr", "curves", "layer_weights", "counts")
    texts = [(folder / name).read_text() for name in ("test.ref", "test.hyp")]
    return {name: result[name] for name in names}, texts


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


# ------------------------------------------------------------------ the upstream


def test_filter_banks_are_those_of_superb():
    waveform = noise(1, 16000)
    (states,) = FilterBanks()(waveform)
    # s3prl's extracter: log Mel filter banks, deltas of deltas, mean and deviation per dimension.
    options = {"num_mel_bins": 80, "frame_length": 25.0, "frame_shift": 10.0}
    expected = torchaudio.compliance.kaldi.fbank(waveform, **options)
    deltas = torchaudio.transforms.ComputeDeltas(win_length=5)
    first = deltas(expected.t()[None])[0].t()
    expected = torch.cat([expected, first, deltas(first.t()[None])[0].t()], dim=-1)
    expected = (expected - expected.mean(0)) / (1e-10 + expected.std(0))
    assert states.shape == (1, 98, 240)
    torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=1e-4)


def test_filter_banks_of_silence_and_of_one_frame_are_finite():
    for waveform in (torch.zeros(1, 4000), noise(1, 400), torch.full((1, 8000), 0.25)):
        (states,) = FilterBanks()(waveform)
        assert states.shape[1] == FilterBanks().frames(waveform.shape[1])
        assert states.abs().max() < 100


@pytest.mark.parametrize("name", ["student.pt", "wavlm.pt"])
def test_states_are_those_of_the_network_in_the_file(upstreams, name):
    network = upstream(upstreams / name)
    expected = torch.load(upstreams / "states.pt")[name]
    for row, waveform in enumerate(noise(2, 8000)):
        computed = network(waveform)
        assert computed.dtype == torch.bfloat16 and network.dim == 48
        for state, by_hand in zip(computed, expected, strict=True):
            torch.testing.assert_close(state.float(), by_hand[row], rtol=0.01, atol=1e-3)
    weights = network.encoder.parameters()
    assert not any(weight.requires_grad for weight in weights) and not network.encoder.training


def test_probe_gives_the_head_the_weighted_sum_of_the_states():
    model = probe.Probe(3, lambda x, frames: x)
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.0, 1.0, -1.0]))
    states = noise(3, 2, 5, 4)
    shares = np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()
    expected = sum(float(share) * state for share, state in zip(shares, states))
    torch.testing.assert_close(model(states, torch.tensor([5, 3])), expected)


# ------------------------------------------------------------------ cached, in memory, or neither


def test_scores_are_the_same_bit_for_bit_wherever_the_states_are(
    upstreams, corpus, tmp_path, capsys, monkeypatch
):
    settings = {"upstream": upstreams / "student.pt", "steps": 4}
    score(corpus, tmp_path / "memory", **settings)
    assert "in memory" in capsys.readouterr().out
    score(corpus, tmp_path / "files", cache=tmp_path / "cache", workers=1, **settings)
    files = sorted(tmp_path.glob("cache/*/*/*/*/*.pt"))
    assert len(files) == 24 + 8 + 8 and torch.load(files[0])["tensors"].dtype == torch.bfloat16
    monkeypatch.setattr("superb.upstream.free_memory", lambda: 0)
    score(corpus, tmp_path / "neither", workers=1, **settings)
    assert "computed at every step" in capsys.readouterr().out
    for name in ("files", "neither"):
        assert comparable(tmp_path / name) == comparable(tmp_path / "memory")


def test_signal_while_states_are_computed_says_what_is_lost(corpus, tmp_path, capsys, monkeypatch):
    computed, call = [], Upstream.__call__

    def stop_at_5(*arguments):
        computed.append(1)
        if len(computed) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*arguments)

    monkeypatch.setattr(Upstream, "__call__", stop_at_5)
    with pytest.raises(SystemExit, match="143"):
        score(corpus, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert "of 40 utterances, in memory, lost if stopped; --cache DIR stores them" in printed[-2]
    assert "the 5 states in memory are lost; with --cache DIR" in printed[-1] and len(computed) == 5


def test_every_long_loop_prints_lines_with_the_time_left(corpus, tmp_path, capsys, monkeypatch):
    clock = itertools.count(0, 25.0)  # every look at it takes 25 s
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    score(corpus, tmp_path, steps=4, log_every=4)
    printed = capsys.readouterr().out
    for line in ("states: 20 of 40, ", "step: 2 of 4, ", "scoring dev-clean: 1 of 1, "):
        assert re.search(f"^{line}[0-9]+ (s|min) left$", printed, re.MULTILINE), line


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_within_the_limits_of_every_cgroup(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50 kB\n")
    lines = ["4:memory:/slurm/job/step\n", "1:cpu:/other\n", "0::/slurm/job/step\n"]
    (tmp_path / "proc/self/cgroup").write_text("".join(lines))
    assert free_memory(tmp_path) == 51200
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}
    limit, used, prefix = names[version]
    root = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")

    def write(group, values):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / f"memory.{limit}").write_text(f"{values[0]}\n")
        (root / group / f"memory.{used}").write_text(f"{values[1]}\n")
        cached = f"{prefix}inactive_file 600\n{prefix}active_file 400\n"
        (root / group / "memory.stat").write_text(f"anon 5\n{cached}")

    write("slurm/job/step", ("max" if version == 2 else 2**63 - 4096, 6000))
    write("slurm/job", (40000, 31000))  # 1,000 of them are cached files
    write("slurm", (90000, 32000))
    write("other", (3000, 2000))
    assert free_memory(tmp_path) == 10000
    write(".", (37000, 32000))  # the container's, if it is mounted as the root
    assert free_memory(tmp_path) == 6000
    write("slurm", (20000, 32000))
    assert free_memory(tmp_path) == 0
    assert free_memory(tmp_path / "nowhere") == 0


def test_cached_states_are_reused_and_damaged_files_computed_again(
    upstreams, corpus, tmp_path, monkeypatch
):
    settings = {"upstream": upstreams / "student.pt", "steps": 4, "cache": tmp_path / "cache"}
    score(corpus, tmp_path / "first", **settings)
    computed = []
    call = Upstream.__call__
    monkeypatch.setattr(Upstream, "__call__", lambda *a: computed.append(1) or call(*a))
    score(corpus, tmp_path / "second", **settings)
    assert not computed
    for path in tmp_path.glob("cache/*/test-clean/*/*/*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    score(corpus, tmp_path / "third", **settings)
    assert len(computed) == 8
    assert comparable(tmp_path / "first") == comparable(tmp_path / "third")


def test_predictions_do_not_depend_on_the_batch_size(upstreams, corpus):
    task = evaluate_pr.PhonemeRecognition(ctc.read_lexicon([corpus / "lexicon.txt"]))
    split = ctc.read_split(str(corpus), "test-clean", task.encode)
    network = upstream(upstreams / "hubert.pt")
    torch.manual_seed(0)
    model = probe.Probe(len(network.layers), task.head(network.dim))
    with torch.no_grad():
        model.head.output.weight.mul_(10)  # so that a random head says something
    stop = argparse.Namespace(number=0)
    predictions = []
    for size in (1, 8):
        args = argparse.Namespace(batch_size=size, workers=0)
        _, (hypotheses,) = probe.predict(args, task, network, [model], split, stop)
        predictions.append(hypotheses)
    assert predictions[0] == predictions[1] and len(set(map(str, predictions[0]))) > 3


# ------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def whole(upstreams, corpus, tmp_path_factory):
    """An uninterrupted run of three rates: (its folder, its settings)."""
    settings = {"upstream": upstreams / "student.pt", "lr": "1e-3,1e-2,2e-2", "lr_decay": True}
    out = tmp_path_factory.mktemp("whole") / "pr"
    score(corpus, out, **settings)
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in checkpoint(out)["optimizers"]]
    assert rates == approx([1e-3 / 12, 1e-2 / 12, 2e-2 / 12])  # decayed over 12 steps
    return out, settings


def test_run_that_is_killed_and_started_again_gives_the_same_bit_for_bit(corpus, whole, tmp_path):
    out, settings = whole
    arguments = command("evaluate_pr.py", *flags(corpus, tmp_path / "pr", **settings))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), **pipes)
    for line in process.stdout:
        if line.startswith("step 6/12"):
            process.kill()
            break
    process.communicate(timeout=300)
    assert process.returncode == -9 and checkpoint(tmp_path / "pr")["step"] in (4, 8)
    score(corpus, tmp_path / "pr", **settings)
    assert comparable(tmp_path / "pr") == comparable(out)


def test_sigterm_ends_a_run_after_its_step_and_it_resumes_bit_for_bit(
    corpus, whole, tmp_path, monkeypatch
):
    out, settings = whole
    losses, loss = [], ctc.ctc_loss

    def stop_in_step_6(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == 6 * 3:  # rates
            os.kill(os.getpid(), signal.SIGTERM)
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_pr.PhonemeRecognition, "loss", staticmethod(stop_in_step_6))
        with pytest.raises(SystemExit, match="143"):
            score(corpus, tmp_path, **settings)
    assert checkpoint(tmp_path)["step"] == 6 and not (tmp_path / "result.json").exists()
    score(corpus, tmp_path, **settings)
    assert comparable(tmp_path) == comparable(out)


def test_damaged_checkpoint_gives_way_to_the_one_before(corpus, whole, tmp_path, capsys):
    out, settings = whole
    shutil.copytree(out, tmp_path / "pr")
    (tmp_path / "pr/result.json").unlink()
    content = (tmp_path / "pr/last.pt").read_bytes()
    (tmp_path / "pr/last.pt").write_bytes(content[: len(content) // 2])
    score(corpus, tmp_path / "pr", **settings)
    printed = capsys.readouterr()
    assert "from step 8 of 12" in printed.out and "last.pt" in printed.err
    assert comparable(tmp_path / "pr") == comparable(out)


def test_finished_run_prints_its_result_and_changes_nothing(corpus, whole, capsys, monkeypatch):
    out, settings = whole
    monkeypatch.setattr(Upstream, "__call__", lambda *_: pytest.fail("upstream was run"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = score(corpus, out, **settings)
    assert f"PER {result['per']:.2%}" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {**after, "lock": 0} == {**before, "lock": 0}
    assert result["upstream"] == {"path": str(settings["upstream"]), "layers": [0, 1, 2]}
    assert result["settings"]["lr"] == [1e-3, 1e-2, 2e-2] and result["noise"] is None
    assert sum(result["layer_weights"]) == approx(1)
    assert result["interval"][0] <= result["per"] <= result["interval"][1]


def test_too_little_shared_memory_is_an_error_before_states_are_computed(
    corpus, tmp_path, capsys, monkeypatch
):
    disk = shutil.disk_usage
    small = shutil._ntuple_diskusage(9, 3, 64000)
    monkeypatch.setattr(shutil, "disk_usage", lambda x: small if x == "/dev/shm" else disk(x))
    more = {"cache": tmp_path / "cache", "workers": 1}
    line = refused(capsys, evaluate_pr, flags(corpus, tmp_path / "out", **more))
    assert "/dev/shm" in line and "--shm-size=" in line and not list(tmp_path.rglob("cache/*/*"))


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_upstreams_and_data_are_refused(
    corpus, whole, upstreams, tmp_path, capsys, finished
):
    out, settings = whole
    shutil.copytree(out, tmp_path / "pr")
    if not finished:
        (tmp_path / "pr/result.json").unlink()
    (tmp_path / "lexicon.txt").write_text((corpus / "lexicon.txt").read_text().replace("IY1", "II"))
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    transcript = next(changed.glob("dev-clean/*/*/*.trans.txt"))
    transcript.write_text(transcript.read_text().replace("\n", " SEE\n", 1))
    changes = {
        "--steps was 12, is 13": {"steps": 13},
        "--lr was": {"lr": "1e-3,1e-2"},
        "upstream changed": {"upstream": upstreams / "hubert.pt"},
        "symbols changed": {"lexicon": tmp_path / "lexicon.txt"},
        "dev-clean changed": {"data": changed},
    }
    for words, change in changes.items():
        line = refused(capsys, evaluate_pr, flags(corpus, tmp_path / "pr", **settings | change))
        assert words in line and "choose another folder" in line


def test_noise_is_the_same_for_every_upstream_and_known_by_content(corpus, tmp_path):
    write_audio(tmp_path, [9000, 70000])
    clean, first, second, other = (
        ctc.read_split(str(corpus), "test-clean", lambda words: [1]) for _ in range(4)
    )
    for number in range(150):
        shutil.copy(tmp_path / "000.flac", tmp_path / f"a{number}.flac")
    (tmp_path / "junk.wav").write_text("no")
    with pytest.warns(UserWarning, match="junk.wav"):
        first.add_noise(str(tmp_path), [5.0])
    second.add_noise(str(tmp_path), [5.0])
    for i in range(8):
        added = first.read(i) - clean.read(i)
        assert torch.equal(first.read(i), second.read(i))
        ratio = clean.read(i).square().sum() / added.square().sum()
        assert 10 * float(ratio.log10()) == approx(5, abs=0.01)
    assert first.noise_key == second.noise_key != clean.noise_key
    write_audio(tmp_path, [9000, 70000], seed=1)
    other.add_noise(str(tmp_path), [5.0])
    second.add_noise(str(tmp_path), [5.0, 6.0])
    assert len({split.noise_key for split in (clean, first, second, other)}) == 4


def test_noisy_evaluation_of_finished_probes_scores_them_without_training(
    corpus, whole, tmp_path, capsys, monkeypatch
):
    out, settings = whole
    write_audio(tmp_path / "noise", [50000])
    settings = settings | {"noise": tmp_path / "noise", "snr": 0}
    score(corpus, tmp_path / "trained", **settings)
    (tmp_path / "copied").mkdir()
    shutil.copy(out / "last.pt", tmp_path / "copied")
    capsys.readouterr()
    score(corpus, tmp_path / "copied", **settings)
    printed = capsys.readouterr().out
    assert "from step 12 of 12" in printed and "of 8 utterances, in memory" in printed
    assert comparable(tmp_path / "copied") == comparable(tmp_path / "trained")
    assert comparable(tmp_path / "copied") != comparable(out)


# ------------------------------------------------------------------ several learning rates


def test_each_rate_of_a_sweep_gives_what_it_gives_alone(corpus, whole, tmp_path):
    out, settings = whole
    result = json.loads((out / "result.json").read_text())
    for i, (rate, curve) in enumerate(result["curves"].items()):
        alone = score(corpus, tmp_path / rate, **settings | {"lr": rate})
        assert alone["curves"] == {rate: curve} and [step for step, _ in curve] == [4, 8, 12]
        weights, expected = checkpoint(out)["probes"][i], checkpoint(tmp_path / rate)["probes"][0]
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        if float(rate) == result["lr"]:
            assert comparable(tmp_path / rate)[1] == comparable(out)[1]
    best = min(score for curve in result["curves"].values() for _, score in curve)
    assert [result["best_step"], best] in result["curves"][f"{result['lr']:g}"]


def test_diverged_rate_is_not_updated_and_does_not_stop_the_others(corpus, tmp_path, capsys):
    result = score(corpus, tmp_path / "with", lr="1e30,1e29,1e-2")
    warning = f"the best --lr, {result['lr']:g}, is the lowest or highest"
    assert warning in capsys.readouterr().err
    alone = score(corpus, tmp_path / "without", lr="1e-2")
    assert result["curves"]["0.01"] == alone["curves"]["0.01"]
    weights = checkpoint(tmp_path / "with")["probes"][0].values()
    assert all(weight.isfinite().all() for weight in weights)
    assert max(map(torch.max, weights)) > 1e29


def test_training_stops_if_no_gradient_is_finite(corpus, tmp_path, monkeypatch):
    loss = ctc.ctc_loss
    nan = staticmethod(lambda *arguments: loss(*arguments) * float("nan"))
    monkeypatch.setattr(evaluate_pr.PhonemeRecognition, "loss", nan)
    with pytest.raises(RuntimeError, match="step 1: the gradient is not finite.* 10[0-9]-1-"):
        score(corpus, tmp_path)


# ------------------------------------------------------------------ results and bad input


def test_interval_is_a_bootstrap_over_utterances():
    half = [[0] * 50 + [1] * 50, [1] * 100]
    value, low, high = probe.mean_and_interval([probe.bootstrap([half])])
    assert value == 0.5 and low == approx(0.4, abs=0.02) and high == approx(0.6, abs=0.02)
    # Test sets of any size count the same.
    assert probe.bootstrap([half, [[1, 1], [1, 1]]]).mean() == approx(0.75, abs=0.01)


def test_interval_over_seeds_is_that_of_students_t():
    """Equal utterances have no spread: what is left is t * s / sqrt(n), here of 0.1 and 0.2."""
    seeds = [probe.bootstrap([[[errors] * 50, [10] * 50]]) for errors in (1, 2)]
    interval = np.array([0.15, 0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05])
    assert probe.mean_and_interval(seeds) == approx(interval)
    varied = probe.bootstrap([[[0] * 50 + [1] * 50, [1] * 100]])  # equal seeds: utterances alone
    assert probe.mean_and_interval([varied, varied]) == approx(probe.mean_and_interval([varied]))
    # Of three seeds, with utterances that vary, it holds the true 0.5 in about 95% of 200 draws.
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        hard = rng.uniform(0, 1, 100)  # an utterance is as hard in every seed
        seeds = []
        for shift in rng.normal(0, 0.05, 3):
            seeds.append(probe.bootstrap([[(hard + shift).tolist(), [1] * 100]]))
        _, low, high = probe.mean_and_interval(seeds)
        inside += low < 0.5 < high
    assert 184 <= inside <= 199


def test_folder_of_a_run_stands_for_its_student(upstreams, corpus, tmp_path):
    shutil.copy(upstreams / "student.pt", tmp_path)
    arguments = flags(corpus, tmp_path / "x", upstream=tmp_path, steps=2)
    place = arguments.index("--out")
    del arguments[place : place + 2]
    on_cpu(evaluate_pr, arguments)
    result = json.loads((tmp_path / "pr/result.json").read_text())
    assert result["upstream"]["path"] == str(tmp_path / "student.pt")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"upstream": "nowhere.pt"}, ["nowhere.pt", "wavlm_plus"]),
        ({"upstream": "{upstreams}/other.pt"}, ["other.pt"]),
        ({"upstream": "{upstreams}/nan.pt"}, ["nan.pt", "NaN or infinite"]),
        ({"lr": "fast"}, ["--lr", "fast"]),
        ({"steps": 0}, ["--steps", "at least 1"]),
        ({"batch_size": 500}, ["a batch of 500", "has 24"]),
        ({"data": "nowhere"}, ["nowhere"]),
        ({"splits": "train-clean-100,dev-clean,test-other"}, ["test-other"]),
        ({"splits": "train-clean-100,dev-clean"}, ["--splits", "three"]),
        ({"splits": "train-clean-100,dev-clean,dev-clean"}, ["used twice in"]),
        ({"noise": "nowhere"}, ["nowhere", "no such folder"]),
        ({"noise": "{upstreams}"}, ["upstreams", "no audio"]),
        ({"noise": "{upstreams}/..", "snr": "9,5"}, ["[9.0, 5.0] dB"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(corpus, upstreams, capsys, tmp_path, change, words):
    change = {k: str(v).format(tmp=tmp_path, upstreams=upstreams) for k, v in change.items()}
    line = refused(capsys, evaluate_pr, flags(corpus, tmp_path / "out", **change))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["evaluate_pr.py", "superb.er"])
def test_several_processes_are_refused_before_anything_waits(tmp_path, name):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
    start = ["-m", name] if "superb" in name else [name]
    done = run(*start, "--upstream", "fbank", "--data", "nowhere", cwd=tmp_path, **torchrun)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "an evaluation is one process" in done.stderr
    assert run(*start, "--help", cwd=tmp_path, **torchrun).returncode == 0


def test_missing_upstream_is_one_line(capsys):
    assert "are required: --upstream" in refused(capsys, evaluate_pr, ["--steps", "1"])


@pytest.mark.parametrize(
    "problem, words, more",
    [
        ("truncated", "flac: .*; restore it", {}),
        ("truncated", "flac: .*; restore it", {"cache": "{tmp}/cache"}),
        ("no length", "flac: a length of .*header", {}),
        ("long", "flac: [2-9] s, evaluations take up to 2 s", {}),
    ],
)
def test_audio_that_cannot_be_used_is_named_in_one_line(
    corpus, tmp_path, capsys, monkeypatch, problem, words, more
):
    more = {name: path.format(tmp=tmp_path) for name, path in more.items()}
    shutil.copytree(corpus, tmp_path / "corpus")
    audio = sorted(tmp_path.glob("corpus/test-clean/*/*/*.flac"))[3]
    content = bytearray(audio.read_bytes())
    if problem == "truncated":  # its header is intact
        del content[len(content) // 2 :]
    if problem == "no length":  # as ffmpeg -f flac - writes it: 36 bits of the header are 0
        content[21] &= 0xF0
        content[22:26] = bytes(4)
    if problem == "long":
        monkeypatch.setattr("superb.upstream.MAX_SECONDS", 2)
    audio.write_bytes(content)
    line = refused(capsys, evaluate_pr, flags(tmp_path / "corpus", tmp_path / "out", **more))
    assert re.search(words, line) and (problem == "long" or audio.name in line)


@pytest.mark.parametrize(
    "task, steps, lr",
    [("pr", 100_000, 1e-2), ("asr", 200_000, 1e-4), ("sid", 200_000, 1e-4), ("er", 30_000, 1e-4)],
)
def test_defaults_are_those_of_superb(task, steps, lr, capsys):
    program = importlib.import_module("evaluate_pr" if task == "pr" else f"superb.{task}")
    args = program.make_parser().parse_args(["--upstream", "fbank"])
    assert (args.task, args.steps, args.lr) == (task, steps, [lr])
    assert args.batch_size == (16 if task == "asr" else 32)  # s3prl halves the batches of ASR
    assert getattr(args, "crop", 8.0) == 8.0 and getattr(args, "hidden", 1024) == 1024
    with pytest.raises(SystemExit):
        program.make_parser().parse_args(["--help"])
    assert capsys.readouterr().out.count("default: ") >= 12


def test_a_stopped_evaluation_in_noise_resumes(corpus, whole, upstreams, tmp_path, monkeypatch):
    write_audio(tmp_path / "noise", [9000, 70000])
    settings = {"upstream": upstreams / "student.pt", "noise": tmp_path / "noise", "snr": 0}
    whole_result = score(corpus, tmp_path / "whole", **settings)
    loss, losses = ctc.ctc_loss, []

    def stop_in_step_6(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_pr.PhonemeRecognition, "loss", staticmethod(stop_in_step_6))
        with pytest.raises(SystemExit, match="143"):
            score(corpus, tmp_path / "stopped", **settings)
    assert score(corpus, tmp_path / "stopped", **settings)["per"] == whole_result["per"]
