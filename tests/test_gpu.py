"""What needs a real GPU; skipped without one. tests/on_gpu.sh runs these and bench.py."""

import os
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import flags, relative_difference, run, shared

import checkpoint
import program
import train
from encoder import EncoderConfig, SpeechEncoder
from student import load_student
from teachers import load_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GOLDEN = ["hubert_fairseq.pt", "robust_hubert_fairseq.pt", "robust_hubert_s3prl.pt"]
GOLDEN += ["wavlm_unilm.pt", "hubert_hf", "wavlm_hf"]


@pytest.fixture(scope="module")
def cuda():
    return program.find_device()


def difference(found, expected):
    """The largest relative difference over two lists of states."""
    pairs = zip(found, expected, strict=True)
    return max(relative_difference(a.float().cpu(), b.float().cpu()) for a, b in pairs)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_official_checkpoints_give_the_official_states(cuda, name, dtype, tolerance):
    golden = shared(f"golden/{name}")
    folder = shared("speech/LibriSpeech/dev-clean/9001/1001")
    audio, _ = soundfile.read(min(folder.glob("*.flac")), dtype="float32", frames=40000)
    expected = torch.from_numpy(np.load(golden.with_suffix(".npz"))["single"])
    with torch.no_grad():
        teacher = load_teacher(str(golden), cuda).to(dtype)
        found = teacher(torch.from_numpy(audio)[None].to(cuda))
    assert difference(found, list(expected)) < tolerance


@pytest.mark.parametrize("buckets", [0, 320])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_padded_states_are_those_of_the_cpu_without_padding(cuda, buckets, dtype, tolerance):
    torch.manual_seed(0)
    encoder = SpeechEncoder(EncoderConfig(layers=4, relative_buckets=buckets))
    encoder.eval().requires_grad_(False)
    waveforms, lengths = 0.1 * torch.randn(3, 48000), [48000, 31234, 16000]
    expected = [encoder(waveform[None, :n]) for waveform, n in zip(waveforms, lengths)]
    padded = encoder.to(cuda).to(dtype)(waveforms.to(cuda), lengths)
    for i, alone in enumerate(expected):
        frames = alone[0].shape[1]
        assert difference([state[i : i + 1, :frames] for state in padded], alone) < tolerance
        assert all(not state[i, frames:].any() for state in padded)


# ------------------------------------------------------------------ training


def distil(job, out, gpu=True, **more):
    """The student's weights after 20 steps."""
    settings = flags(job, out, save_every=10, **more)
    done = run("train.py", *settings, cwd=job, CUDA_VISIBLE_DEVICES="0" if gpu else "")
    device = "cuda" if gpu else "cpu"
    assert done.returncode == 0 and f" on {device}" in done.stdout, done.stderr[-3000:]
    return load_student(str(job / out)).state_dict()


def largest_change(found, expected):
    return max(
        float((found[name] - weight).norm() / weight.norm().clamp(min=1e-3))
        for name, weight in expected.items()
    )


@pytest.mark.parametrize(
    "more, tolerance",
    [
        ({}, 2e-3),
        ({"precision": "bf16"}, 5e-2),
        ({"cache": "cache"}, 5e-2),
        ({"accumulate": 2}, 2e-3),
        ({"compile": True}, 2e-3),
    ],
    ids=["fp32", "bf16", "cache", "accumulate", "compile"],
)
def test_a_gpu_trains_the_student_of_the_cpu(job, more, tolerance):
    if not (job / "cpu").exists():
        distil(job, "cpu", gpu=False)
    expected = load_student(str(job / "cpu")).state_dict()
    assert largest_change(distil(job, "-".join(["gpu", *more]), **more), expected) < tolerance


def test_a_resumed_run_ends_with_the_student_of_an_uninterrupted_one(job):
    expected = distil(job, "uninterrupted", dropout=0.1)
    distil(job, "resumed", dropout=0.1)
    os.replace(job / "resumed" / "last.pt.old", job / "resumed" / "last.pt")  # of step 10
    assert largest_change(distil(job, "resumed", dropout=0.1), expected) < 2e-3


def test_a_step_has_one_sync(job, monkeypatch):
    messages = []
    # program.init() makes this the function that shows warnings.
    monkeypatch.setattr(program, "show_warning", lambda message, *_: messages.append(str(message)))

    def count_syncs(steps):
        messages.clear()
        settings = {"steps": steps, "log_every": 1000, "save_every": 1000}
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train.main(flags(job, job / f"syncs{steps}", **settings))
            torch.cuda.set_sync_debug_mode("default")
        checkpoint.locks.clear()
        return sum("synchroniz" in message for message in messages)

    assert count_syncs(13) - count_syncs(3) == 10


def test_the_demo_runs(tmp_path):
    settings = {"STEPS": "20", "PR": "--steps 20", "SID": "--steps 20", "ER": "--steps 20"}
    tasks = "pr,pr-noise,sid,er"
    done = run(
        *("-m", "demo", "--rows", "avg", "--tasks", tasks),
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="0",
        **settings,
    )
    assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr[-3000:]
