"""What needs a real GPU; skipped without one. tests/on_gpu.sh runs these and bench.py, and prints one table."""

import processes

import os

import numpy as np
import pytest
import torch
from conftest import flags_of, random_encoder, run, write_audio

import train
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from student import load_student
from teachers import load_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "shared")
GOLDEN = [
    "hubert_fairseq.pt",
    "robust_hubert_fairseq.pt",
    "robust_hubert_s3prl.pt",
    "wavlm_unilm.pt",
    "hubert_hf",
    "wavlm_hf",
]


@pytest.fixture(scope="module")
def cuda():
    return processes.device()


def apart(a, b):
    """How far two lists of states are apart, relative to the second."""
    return max(
        float((x.float().cpu() - y.float().cpu()).norm() / y.float().norm().cpu()) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_golden_states_of_official_checkpoints(cuda, name, dtype, tolerance):
    soundfile = pytest.importorskip("soundfile")
    golden = os.path.join(SHARED, "golden", name)
    if not os.path.exists(golden):
        pytest.skip("no golden files here")
    folder = os.path.join(SHARED, "speech", "LibriSpeech", "dev-clean", "9001", "1001")
    first = sorted(file for file in os.listdir(folder) if file.endswith(".flac"))[0]
    waveform = torch.from_numpy(soundfile.read(os.path.join(folder, first), dtype="float32")[0][:40000])[None]
    expected = np.load(os.path.splitext(golden)[0] + ".npz")["single"]
    with torch.no_grad():
        states = load_teacher(golden, cuda).to(dtype)(waveform.to(cuda))
    assert apart(states, list(torch.from_numpy(expected))) < tolerance


@pytest.mark.parametrize("buckets", [0, 320])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_base_networks_give_the_cpus_states_padded_or_alone(cuda, buckets, dtype, tolerance):
    torch.manual_seed(0)
    encoder = SpeechEncoder(EncoderConfig(layers=4, relative_buckets=buckets)).eval().requires_grad_(False)
    waveforms, lengths = 0.1 * torch.randn(3, 48000), [48000, 31234, 16000]
    expected = [encoder(waveform[None, :length]) for waveform, length in zip(waveforms, lengths)]
    padded = encoder.to(cuda).to(dtype)(waveforms.to(cuda), lengths)
    for place, alone in enumerate(expected):
        frames = alone[0].shape[1]
        assert apart([state[place : place + 1, :frames] for state in padded], alone) < tolerance
        assert all(not state[place, frames:].any() for state in padded)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_audio(folder / "audio", [6000 + 397 * i for i in range(25)])
    for number, form in enumerate(("fairseq", "s3prl", "microsoft")):
        more = {"relative_buckets": 320} if form == "microsoft" else {}
        save_official(random_encoder(number, **more), folder / f"{form}.pt", form)
    return folder


def distil(job, out, gpu=True, **more):
    settings = dict(teachers=f"{job}/fairseq.pt,{job}/s3prl.pt,{job}/microsoft.pt", heads="2,4", data=job / "audio")
    settings |= dict(
        splits=".", steps=20, batch_size=8, lr=1e-3, max_seconds=0.5, precision="fp32", dropout=0, workers=0
    )
    flags = flags_of(
        settings | dict(log_every=5, save_every=10, out=out) | {k: v for k, v in more.items() if v is not True}
    )
    flags += [f"--{key}" for key, value in more.items() if value is True]
    done = run("train.py", *flags, cwd=job, CUDA_VISIBLE_DEVICES="0" if gpu else "")
    assert done.returncode == 0 and ("x cuda" in done.stdout) == gpu, done.stderr[-3000:]
    return load_student(job / out).state_dict()


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
def test_twenty_steps_give_the_cpus_student(job, more, tolerance):
    expected = distil(job, "cpu", gpu=False)
    found = distil(job, "-".join(["gpu", *more]), **more)
    assert max(float((found[n] - w).norm() / w.norm().clamp(min=1e-3)) for n, w in expected.items()) < tolerance


def test_a_run_that_is_resumed_ends_as_one_that_was_not(job):
    expected = distil(job, "whole", dropout=0.1)
    distil(job, "parts", dropout=0.1, steps=20)
    os.replace(job / "parts" / "last.1.pt", job / "parts" / "last.pt")  # as after 10 steps
    found = distil(job, "parts", dropout=0.1)
    assert max(float((found[n] - w).norm() / w.norm().clamp(min=1e-3)) for n, w in expected.items()) < 2e-3


def test_nothing_but_lines_and_saves_makes_the_host_wait(job, monkeypatch):
    """torch counts what synchronizes: 30 steps without a line are to have as few as 3."""

    def waits(steps):
        found = []
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns() as caught:
            train.main(
                flags_of(
                    dict(
                        teachers=job / "fairseq.pt",
                        heads="2",
                        data=job / "audio",
                        splits=".",
                        steps=steps,
                        batch_size=8,
                    )
                    | dict(max_seconds=0.5, workers=0, log_every=1000, save_every=1000, out=job / f"waits{steps}")
                )
            )
        torch.cuda.set_sync_debug_mode("default")
        found += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        return len(found)

    assert waits(3) == waits(30)


@pytest.mark.parametrize("program", ["train", "evaluate_pr", "evaluate_sid", "evaluate_er", "evaluate_asr"])
def test_demos_run(tmp_path_factory, program):
    folder = tmp_path_factory.getbasetemp() / "demos"
    folder.mkdir(exist_ok=True)
    done = run(f"{program}.py", "--demo", cwd=folder, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0 and "cuda" in done.stdout, done.stderr[-3000:]
