"""How long the parts of a step of train.py take, with three Base teachers of random weights.

    python bench.py --cache

The first two steps are not timed.
"""

import runs

import tempfile
import time

import numpy as np
import soundfile
import torch

import aggregate
import data
import train
from cache import Cache, CachedTargets, dequantize, quantize
from encoder import EncoderConfig, SpeechEncoder
from losses import distillation_loss
from student import Student, initialise, student_config
from teachers import layers_per_teacher

TEACHERS = ["hubert-1", "hubert-2", "wavlm"]
PARTS = ["data", "targets", "forward", "backward", "optimizer"]
WARMUP = 2  # steps that are not timed


def write_audio(folder, seconds):
    """Writes one FLAC file of noise per length in seconds. Returns the Corpus."""
    rng = np.random.default_rng(0)
    for number, length in enumerate(seconds):
        noise = 0.1 * rng.standard_normal(int(length * data.SAMPLE_RATE))
        soundfile.write(f"{folder}/{number:03}.flac", noise, data.SAMPLE_RATE)
    return data.find_corpus(folder, ["."])


def main(arguments=None):
    with runs.one_line_errors():
        parser = runs.Parser(__doc__.split("\n")[0])
        add = parser.add_argument
        add("--seconds", type=float, nargs="+", default=[8, 7.6, 7.1, 6.5], help="of utterances")
        add("--heads", type=train.parse_layers, default="4,8,12", help="layers to predict")
        add("--agg", choices=list(aggregate.AGGREGATIONS), default="avg", help="aggregation")
        add("--steps", type=runs.count, default=5, help="timed steps, after two that are not timed")
        add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="as in train.py")
        add("--compile", action="store_true", help="torch.compile teachers and student")
        add("--cache", action="store_true", help="also time steps with cached targets, in turn")
        args = parser.parse_args(arguments)
        device = runs.find_device()
        precision = runs.precision(args.precision, device)
        torch.manual_seed(0)
        configs = [EncoderConfig(relative_buckets=buckets) for buckets in (0, 0, 320)]
        teachers = [SpeechEncoder(config).eval().to(device) for config in configs]
        layers_of = layers_per_teacher(args.heads, teachers, TEACHERS)
    heads = aggregate.heads(args.agg, layers_of, [(name, configs[0].dim) for name in TEACHERS])
    dims = [dim for _, dim in heads]
    student = Student(student_config(configs[0]), heads)
    initialise(student, teachers[0])
    student.to(device).train()
    if precision == "bf16":
        teachers = [teacher.to(torch.bfloat16) for teacher in teachers]
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    optimizer = train.adamw(student, weight_decay=0.01)
    optimizer.param_groups[0]["lr"] = 2e-4
    if args.compile:
        train.compile_networks([*teachers, student])
    stop = runs.StopSignal()

    def compute_cached(i):
        waveform = corpus.read(i)[None].to(device)
        return quantize(train.compute_targets(teachers, layers_of, args.agg, waveform)[0])

    def now():
        if device.type == "cuda":  # parts wait for each other, which makes a step a bit slower
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(loader):
        """One step, as in train.py. Returns the seconds of each part."""
        times = [now()]
        batch = next(loader)
        tensors = {name: x for name, x in batch.items() if torch.is_tensor(x)}
        batch = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        times.append(now())
        if "values" in batch:
            targets = dequantize(batch["values"], batch["scale"])
        else:
            targets = train.compute_targets(teachers, layers_of, args.agg, batch["waveforms"])
        times.append(now())
        with bf16:
            predictions = student(batch["waveforms"])
        loss, _, _ = distillation_loss(predictions, targets.split(dims, dim=-1))
        times.append(now())
        loss.backward()
        times.append(now())
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        if stop.received():
            raise SystemExit(128 + stop.number)
        times.append(now())
        return np.diff(times)

    with tempfile.TemporaryDirectory() as folder:
        corpus = write_audio(folder, args.seconds)
        batches = {"step": data.TrainBatches(corpus, len(corpus))}
        if args.cache:
            cache = Cache(f"{folder}/targets", corpus)
            sizes = [sum(dims) * (student.encoder.frames(n) + 4) for n in corpus.samples.tolist()]
            cache.fill(compute_cached, sizes, "targets", stop)
            batches["step with cached targets"] = CachedTargets(cache, len(corpus))
        steps = range(WARMUP + args.steps)
        workers = min(4, runs.cores())
        loaders, seconds = {}, {}
        for name, dataset in batches.items():
            loaders[name] = data.load_batches(dataset, steps, workers, device.type == "cuda", stop)
            seconds[name] = []
        for _ in steps:
            for name, loader in loaders.items():  # in turn, as a machine's speed varies
                seconds[name].append(step(loader))
    _, crops, _ = batches["step"].plan(0)
    audio = len(corpus) * crops[0] / data.SAMPLE_RATE
    print(f"{', '.join(TEACHERS)}; --agg {args.agg}; heads {', '.join(student.head_names)}")
    print(f"{audio:.1f} s of audio per step; {precision} on {device.type}")
    for name, measured in seconds.items():
        measured = np.array(measured[WARMUP:])  # (steps, parts)
        total = np.median(measured.sum(1))
        print(f"{name}: {total:.3g} s, {audio / total:.3g} s of audio per second")
        for part, median in zip(PARTS, np.median(measured, axis=0)):
            print(f"  {part:10}{median:.3g} s")


if __name__ == "__main__":
    runs.run(main)
