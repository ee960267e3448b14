"""What the tests share: small networks, speech beside the checkout, ways to run programs."""

import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import program
from demo import speech
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from manifest import find_corpus
from student import Student, save_student, student_config

torch.set_num_threads(1)  # as in the programs that tests start: sums depend on it
ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

SMALL = EncoderConfig(
    conv_layers=((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2,
    dim=48,
    ffn_dim=96,
    attention_heads=4,
    layers=4,
    pos_kernel=32,
    pos_groups=4,
)
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


# ------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """torch.hub's cache in a temporary folder, so that no test writes into the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TORCH_HOME"] = str(folder)
    torch.hub.set_dir(str(folder / "hub"))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus almost without noise, with its transcripts and lexicon."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {"train-clean-100": (132, 6, 2), "dev-clean": (16, 2, 1), "test-clean": (16, 2, 1)}
    speech.write_corpus(folder, splits=splits, decibels=(50, 50))
    return folder


@pytest.fixture(scope="session")
def upstreams(tmp_path_factory):
    """Files of a student, also with a weight that is NaN, two teachers and a web page.

    states.pt: hidden states of student.pt and wavlm.pt for noise(2, 8000).
    """
    folder = tmp_path_factory.mktemp("upstreams")
    torch.manual_seed(0)
    student = Student(student_config(SMALL), [("layer2", 48)]).eval()
    wavlm = random_encoder(0, relative_buckets=320)
    save_student(student, folder / "student.pt")
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    save_official(wavlm, folder / "wavlm.pt", "microsoft")
    (folder / "other.pt").write_text("<html>Sign in</html>")
    expected = {"student.pt": states(student.encoder, noise(2, 8000))}
    expected["wavlm.pt"] = states(wavlm, noise(2, 8000))
    torch.save(expected, folder / "states.pt")
    next(student.parameters()).data.flatten()[0] = torch.nan
    save_student(student, folder / "nan.pt")
    return folder


@pytest.fixture
def few(tmp_path):
    """A Corpus of nine files of different lengths."""
    write_audio(tmp_path / "audio", [4000 + 1357 * i for i in range(9)])
    return find_corpus(str(tmp_path / "audio"), ["."])


def shared(path):
    """A file or folder of ../shared; without it the test is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is not here")
    return SHARED / path


# ------------------------------------------------------------------ networks and audio


def random_encoder(seed=0, **sizes):
    """A small SpeechEncoder with every parameter random, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SpeechEncoder(dataclasses.replace(SMALL, **sizes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return encoder


def random_student(**sizes):
    """A small Student with every parameter random, and a teacher of the same sizes."""
    torch.manual_seed(3)
    teacher = random_encoder(**sizes)
    student = Student(student_config(teacher.config), HEADS)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student.eval(), teacher


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(encoder, waveforms, *arguments, **keywords):
    with torch.no_grad():
        return encoder(waveforms, *arguments, **keywords)


def largest_difference(found, expected):
    """Over two lists of tensors or arrays."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - torch.as_tensor(b)).abs().max()) for a, b in pairs)


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


def write_audio(folder, lengths, rate=16000, seed=0, suffix=".flac"):
    """Files of filtered noise, one per length in samples; returns the paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}{suffix}" for number in range(len(lengths))]
    for path, length in zip(paths, lengths):
        sound = np.convolve(rng.standard_normal(length + 7), np.hanning(8), "valid")
        soundfile.write(path, 0.1 * sound, rate)
    return paths


# ------------------------------------------------------------------ programs


def environment(**variables):
    """For a program started by a test: this source, one thread, no GPU unless given one."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": "", **variables}


def command(*arguments, processes=None):
    """The command of a program: "train.py", ... or "-m", "superb.sid", ...

    processes: number of processes of torchrun, or None for plain python.
    """
    name, *rest = map(str, arguments)
    if name != "-m":
        name = str(ROOT / name)
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, name, *rest]


def run(*arguments, cwd, processes=None, **variables):
    """A program as a user starts it, see command(). Returns the finished process."""
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=1200,
    )


def on_cpu(module, arguments):
    """A program's main() in this process, which saves a start of Python; without a GPU."""
    handlers = {number: signal.getsignal(number) for number in program.SIGNALS}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setattr(sys, "argv", [module.__file__])
            module.main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        checkpoint.locks.clear()  # as at the end of a process
        program.StopSignal.number = 0


def refused(capsys, module, arguments):
    """The line on stderr with which a program's main() rejects bad input, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        on_cpu(module, arguments)
    line = capsys.readouterr().err
    name = os.path.basename(module.__file__)
    assert end.value.code == 2 and line.count("\n") == 1 and line.startswith(f"{name}: "), line
    return line


def flags_of(settings):
    """["--batch-size", "8"] from {"batch_size": 8}; True stands for a flag without a value."""
    flags = []
    for key, value in settings.items():
        flags.append(f"--{key.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    return flags


def obey_permissions():
    """In a new process: gives up root's right to write everywhere."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def read_symbols(path):
    """{ID: [symbol, ...]} of test.hyp or test.ref."""
    lines = path.read_text().splitlines()
    return {name: symbols for name, *symbols in map(str.split, lines)}


def metrics(out):
    """The rows of OUT/metrics.jsonl."""
    lines = (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A folder with audio and four small teachers in official forms."""
    folder = tmp_path_factory.mktemp("job")
    write_audio(folder / "audio", [6000 + 397 * i for i in range(25)])
    write_audio(folder / "audio" / "telephone", [5000 + 400 * i for i in range(5)], 8000, seed=1)
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    save_official(random_encoder(1), folder / "robust.pt", "s3prl")
    save_official(random_encoder(2, relative_buckets=320), folder / "wavlm.pt", "microsoft")
    large = random_encoder(3, dim=64, relative_buckets=320, **LARGE)
    save_official(large, folder / "wavlm_large.pt", "microsoft")
    return folder


def flags(job, out, **more):
    """The flags of a run of 20 short steps."""
    settings = {"teachers": f"{job}/hubert.pt,{job}/robust.pt,{job}/wavlm.pt", "heads": "2,4"}
    settings |= {"data": job / "audio", "splits": ".", "steps": 20, "batch_size": 8, "lr": 1e-3}
    settings |= {"max_seconds": 0.5, "precision": "fp32", "dropout": 0, "workers": 0}
    return flags_of(settings | {"log_every": 5, "out": out} | more)
