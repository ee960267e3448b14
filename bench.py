"""How long the parts of a step of train.py take, with three Base teachers of random weights.

    python bench.py --cache
    python bench.py --agg concat --precision bf16

Other flags are those of train.py. The first two steps are not timed.
"""

import runs

import contextlib
import tempfile
import time
from unittest import mock

import numpy as np
import soundfile
import torch

import data
import train
from encoder import EncoderConfig, SpeechEncoder

TEACHERS = {"hubert-1": 0, "hubert-2": 0, "wavlm": 320}  # relative position buckets
PARTS = {  # functions that train.main() calls at every step
    "targets": [(train, "compute_targets"), (train, "dequantize")],
    "forward": [(train.Student, "__call__")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [(torch.optim.AdamW, "step")],
}
WARMUP = 2  # steps that are not timed
ROUNDS = 2


def load_teacher(name, device):
    config = EncoderConfig(relative_buckets=TEACHERS[name])
    return SpeechEncoder(config).to(device).eval().requires_grad_(False)


def write_audio(folder, seconds):
    """Writes one FLAC file of noise per length in seconds."""
    rng = np.random.default_rng(0)
    for number, length in enumerate(seconds):
        noise = 0.1 * rng.standard_normal(int(length * data.SAMPLE_RATE))
        soundfile.write(f"{folder}/{number:03}.flac", noise, data.SAMPLE_RATE)


def timed(function, part, times):
    """The function, which also adds (part, start, end) in seconds to `times` at every call."""

    def now():
        if torch.cuda.is_initialized():  # parts wait for each other: a step is a bit slower
            torch.cuda.synchronize()
        return time.perf_counter()

    def call(*args, **keywords):
        start = now()
        result = function(*args, **keywords)
        times.append((part, start, now()))
        return result

    return call


def time_steps(flags):
    """Runs train.py. Returns the seconds of each step and part, (steps, parts), the rest last."""
    times = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(train, "load_teacher", load_teacher))
        for part, functions in PARTS.items():
            for owner, name in functions:
                function = timed(getattr(owner, name), part, times)
                patches.enter_context(mock.patch.object(owner, name, function))
        train.main(flags)
    ends = [end for part, _, end in times if part == "optimizer"][WARMUP - 1 :]
    steps = []
    for before, after in zip(ends, ends[1:]):
        inside = [(part, end - start) for part, start, end in times if before < end <= after]
        seconds = [sum(s for part, s in inside if part == name) for name in PARTS]
        steps.append([*seconds, after - before - sum(seconds)])
    return steps


def main(arguments=None):
    with runs.one_line_errors():
        parser = runs.Parser(__doc__.split("\n")[0])
        add = parser.add_argument
        add("--seconds", type=float, nargs="+", default=[8, 7.6, 7.1, 6.5], help="of utterances")
        add("--steps", type=runs.count, default=5, help="timed steps per round")
        add("--cache", action="store_true", help="also time steps with cached targets")
        args, others = parser.parse_known_args(arguments)
    flags = ["--teachers", ",".join(TEACHERS), "--splits", ".", "--max-seconds", "inf"]
    flags += ["--batch-size", str(len(args.seconds)), "--steps", str(WARMUP + args.steps)]
    measured = {"step": []}
    if args.cache:
        measured["step with cached targets"] = []
    with tempfile.TemporaryDirectory() as folder:
        write_audio(folder, args.seconds)
        for number in range(ROUNDS):  # in turn, as a machine's speed varies
            for kind, steps in measured.items():
                cache = ["--cache", f"{folder}/targets"] if kind != "step" else []
                out = f"{folder}/{number}{kind}"
                steps += time_steps([*flags, *others, *cache, "--data", folder, "--out", out])
    samples = int(min(args.seconds) * data.SAMPLE_RATE) // data.CROP_MULTIPLE * data.CROP_MULTIPLE
    audio = len(args.seconds) * samples / data.SAMPLE_RATE
    print(f"\n{', '.join(TEACHERS)}; {audio:.1f} s of audio per step")
    for kind, steps in measured.items():
        total = np.median(np.sum(steps, axis=1))
        print(f"{kind}: {total:.3g} s, {audio / total:.3g} s of audio per second")
        for part, median in zip([*PARTS, "rest"], np.median(steps, axis=0)):
            print(f"  {part:10}{median:.3g} s")


if __name__ == "__main__":
    runs.run(main)
