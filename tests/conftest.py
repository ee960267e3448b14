"""What the tests share: small networks, real speech where it lies beside the checkout, and ways to run the programs."""

import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

import demo as demo_file
from data import find_corpus
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from student import Student, save_student, student_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

SMALL = EncoderConfig(
    conv_layers=((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2,
    dim=48,
    ffn_dim=96,
    heads=4,
    layers=4,
    pos_kernel=32,
    pos_groups=4,
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """torch.hub's cache in a temporary folder: no test writes into the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TORCH_HOME"] = str(folder)
    torch.hub.set_dir(str(folder / "hub"))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus in a quiet place, with its transcripts and lexicon."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {"train-clean-100": (132, 6, 2), "dev-clean": (16, 2, 1), "test-clean": (16, 2, 1)}
    demo_file.write_corpus(folder, splits=splits, decibels=(50, 50))
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What `torchrun ... train.py --demo` leaves: (the folder it ran in, what it printed, seconds it took)."""
    folder, start = tmp_path_factory.mktemp("demo"), time.monotonic()
    done = run("train.py", "--demo", cwd=folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, time.monotonic() - start


@pytest.fixture(scope="session")
def upstreams(tmp_path_factory):
    """A student, two teachers and a web page in files, and on noise(2, 8000) the hidden states of two of them by hand."""
    folder = tmp_path_factory.mktemp("upstreams")
    torch.manual_seed(0)
    student = Student(student_config(SMALL), [("layer2", 48)]).eval()
    wavlm = random_encoder(0, relative_buckets=320)
    save_student(student, folder / "student.pt")
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    save_official(wavlm, folder / "wavlm.pt", "microsoft")
    (folder / "other.pt").write_text("<html>Sign in</html>")
    with torch.no_grad():
        by_hand = {"student.pt": student.hidden_states(noise(2, 8000)), "wavlm.pt": wavlm(noise(2, 8000))}
    torch.save(by_hand, folder / "states.pt")
    return folder


@pytest.fixture
def few(tmp_path):
    """A corpus of nine files of different lengths."""
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)])
    return find_corpus(tmp_path / "audio", ["."])


def shared(path):
    """A file or folder of ../shared; the test is skipped where there is none."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is not here")
    return SHARED / path


def random_encoder(seed=0, **sizes):
    """A SpeechEncoder at small sizes with every parameter random, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SpeechEncoder(dataclasses.replace(SMALL, **sizes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() > 1 else 0.1))
    return encoder


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LARGE = {"conv_norm": "layer", "pre_norm": True, "normalize": True, "conv_bias": True}
KINDS = {
    "hubert": {},
    "hubert_large": LARGE,
    "wavlm": {"relative_buckets": 320},
    "wavlm_large": {"relative_buckets": 320, **LARGE},
}
FAMILY = KINDS | {
    "data2vec": {"conv_norm": "layer", "pos_depth": 3, "pos_kernel": 19},
    "distilhubert": {"projection_norm": False},
}
HEADS = [("layer2", 48), ("layer4", 96)]


def random_student(**sizes):
    """A Student at small sizes with every parameter random, and the teacher whose sizes it has."""
    torch.manual_seed(3)
    teacher = random_encoder(**sizes)
    student = Student(student_config(teacher.config), HEADS)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student.eval(), teacher


def states(encoder, waveforms, *arguments, **keywords):
    with torch.no_grad():
        return encoder(waveforms, *arguments, **keywords)


def largest_difference(ours, theirs):
    return max(float((a - torch.as_tensor(b)).abs().max()) for a, b in zip(ours, theirs, strict=True))


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


def write_audio(folder, lengths, rate=16000, seed=0, suffix=".flac"):
    """Files of filtered noise, one for each length in samples; returns their paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}{suffix}" for number in range(len(lengths))]
    for path, length in zip(paths, lengths):
        sound = np.convolve(rng.standard_normal(length + 7), np.hanning(8), "valid")
        soundfile.write(path, 0.1 * sound, rate)
    return paths


def environment(**more):
    """For a program started by a test: this source, one thread, no GPU unless the test gives it one."""
    more = {"CUDA_VISIBLE_DEVICES": "", **more}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(*arguments, cwd, processes=None, **variables):
    """A program of ours as a user starts it: python, or torchrun with `processes`. Returns the finished process."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program, *rest = map(str, arguments)
    command, env = [*start, str(ROOT / program), *rest], environment(**variables)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def obey_permissions():
    """In a new process: root's right to write where nobody may is given up."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def flags_of(settings):
    """{"batch_size": 8} as a user types it: ["--batch-size", "8"]."""
    return [str(part) for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]


def on_cpu(program, arguments):
    """A program's main() in this process, which saves a start of Python; without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", [f"{program.__name__}.py"])
        program.main(arguments)


def refused(capsys, program, arguments):
    """The one line on stderr with which a program's main() refuses, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        on_cpu(program, arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and line.startswith(f"{program.__name__}.py: "), line
    return line


def read_symbols(path):
    """{ID: [symbol, ...]} of test.hyp or test.ref."""
    return {name: symbols for name, *symbols in map(str.split, path.read_text().splitlines())}


def metrics(out):
    return [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()]
