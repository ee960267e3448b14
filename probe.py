"""SUPERB's probe: a frozen upstream, a learned weighted sum of its hidden states, a small head.

Source: arXiv:2105.01051 and s3prl's downstream tasks. A task defines the attributes and
methods of PhonemeRecognition in evaluate_pr.py.
"""

import runs

import contextlib
import json
import math
import os
import time

import numpy as np
import torch
import torchaudio
from torch import nn

import data
from cache import Cache, compute_states, key, load_states
from student import load_student
from teachers import digest, load_teacher

MAX_SECONDS = 160  # the upstream gets whole utterances
# Not compared as settings on resume: weights, paths, lengths and noise are compared instead.
MAY_CHANGE = "out cache workers log_every upstream data lexicon manifest noise snr".split()


def parser(description, task, **defaults):
    """The flags that all tasks share. task: folder name for --out; defaults: of single flags."""
    parser = runs.Parser(description.split("\n")[0])
    add = parser.add_argument
    add("--upstream", help="a student.pt, a teacher's name or checkpoint, or fbank")
    add("--data", default="data/LibriSpeech", help="folder of the corpus")
    if "splits" in defaults:
        add("--splits", type=runs.names, help="three sub-folders: train, dev, test")
    add("--out", help="folder of the run; if not given, beside a student.pt or in runs")
    add("--steps", type=runs.count, default=100_000, help="optimizer steps")
    add("--batch-size", type=runs.count, default=32, help="utterances per step")
    add("--lr", type=runs.numbers, default="1e-4", help="Adam's learning rates, one probe per rate")
    add("--states", type=state_numbers, default="all", help="hidden states: all, last or 0,4,12")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the upstream")
    add("--noise", metavar="DIR", help="mix noise of the files there into the test split")
    add("--snr", type=runs.numbers, default="5", help="signal-to-noise ratio in dB, or low,high")
    add("--cache", metavar="DIR", help="cache the hidden states there, for later runs too")
    add("--workers", type=runs.whole, default=min(4, runs.cores()), help="data-loading workers")
    add("--seed", type=runs.whole, default=0, help="of initial weights, data order and dropout")
    add("--log-every", type=runs.count, default=100, help="steps between lines of progress")
    add("--eval-every", type=runs.count, default=1000, help="steps between scores and checkpoints")
    add("--demo", action="store_true", help="synthetic speech; compares four upstreams")
    parser.set_defaults(task=task, **defaults)
    return parser


def state_numbers(text):
    """Flag type: all, last, or numbers of hidden states."""
    return text if text in ("all", "last") else sorted({int(state) for state in text.split(",")})


def parse(parser, arguments):
    """The settings. With --demo the defaults are those of demo/speech.py."""
    if parser.parse_known_args(arguments)[0].demo:
        from demo import speech

        settings = {"batch_size": 16, "lr": "5e-3"} | speech.SETTINGS[parser.get_default("task")]
        parser.set_defaults(**settings, log_every=settings["eval_every"])
    return parser.parse_args(arguments)


def main(parse_flags, run_task, arguments):
    """Runs a task: run_task(args), or with --demo and no --upstream, on four upstreams in turn."""
    runs.init()
    with runs.one_line_errors():
        args = parse_flags(arguments)
        if not (args.demo or args.upstream):
            raise ValueError("--upstream: give a student.pt, a teacher, or fbank")
        if args.demo:
            from demo import speech

            speech.prepare()
    if not args.upstream:
        return speech.compare(run_task, args)
    if os.path.exists(os.path.join(args.upstream, "student.pt")):  # the folder of a run
        args.upstream = os.path.join(args.upstream, "student.pt")
    folder, name = os.path.split(os.path.normpath(args.upstream))
    if name != "student.pt":
        folder = os.path.join("runs", os.path.splitext(name)[0])
    args.out = args.out or os.path.join(folder, args.task)
    run_task(args)


# ------------------------------------------------------------------ upstream and probe


class FilterBanks(nn.Module):
    """SUPERB's baseline: 80 log Mel filter banks, deltas and delta-deltas, normalized, every 10 ms.

    Source: s3prl's upstream/baseline/fbank.yaml and extracter.py.
    """

    def frames(self, samples):
        """Number of windows of 25 ms that lie within the utterance."""
        return max((samples - 400) // 160 + 1, 0)

    def forward(self, waveforms, layers=None):
        """(1, samples) at 16 kHz to one state, [(1, frames, 240)]."""
        mel = torchaudio.compliance.kaldi.fbank(waveforms, num_mel_bins=80, sample_frequency=16000)
        delta = torchaudio.functional.compute_deltas(mel.t())
        x = torch.cat([mel, delta.t(), torchaudio.functional.compute_deltas(delta).t()], dim=1)
        # Not in s3prl: without a minimum, a silent band becomes loud rounding noise.
        deviation = x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-5)
        return [((x - x.mean(0)) / deviation)[None]]


class Upstream:
    """The frozen encoder --upstream: a student, a teacher in any official form, or "fbank".

    layers: the hidden states in use, from 0; dim: width of each; digest: hash of sizes and weights.
    """

    def __init__(self, args):
        self.device = runs.find_device()
        self.precision = runs.precision(args.precision, self.device)
        self.memory = {}  # see cache.States
        path, last = args.upstream, 0
        if path == "fbank":
            self.encoder, self.precision = FilterBanks(), "fp32"
            self.digest, self.dim = key(path), 240
        else:
            self.encoder = load_encoder(path, self.device)
            self.digest, self.dim = digest(self.encoder), self.encoder.config.dim
            last = self.encoder.config.layers
        layers = {"all": list(range(last + 1)), "last": [last]}
        self.layers = layers.get(str(args.states), args.states)
        if not 0 <= min(self.layers) <= max(self.layers) <= last:
            raise ValueError(f"--states {args.states}: {path} has hidden states 0 to {last}")

    @torch.no_grad()
    def __call__(self, waveform):
        """Hidden states of a waveform, (states, frames, dim), in bfloat16 as they are cached."""
        waveforms = waveform[None].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.encoder(waveforms, layers=self.layers)
        return torch.cat(found).bfloat16()


def load_encoder(path, device):
    """The encoder of a student or of a teacher, in eval mode."""
    if os.path.isfile(path) or path.endswith("student.pt"):
        with contextlib.suppress(ValueError):  # not a student
            return load_student(path, device).encoder.requires_grad_(False)
    return load_teacher(path, device)


class Probe(nn.Module):
    """All that is trained: one weight per hidden state, and the head of a task."""

    def __init__(self, state_count, head):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(state_count))
        self.head = head

    def forward(self, states, frames):
        """states: (states, batch, frames, dim); frames: (batch,), number per utterance."""
        return self.head(torch.tensordot(self.weights.softmax(0), states, dims=1), frames)


# ------------------------------------------------------------------ labelled utterances


class Split:
    """Labelled utterances of a data.Corpus.

    ids, labels: per utterance; skipped: {id: reason} of the utterances that are not used.
    Raises ValueError if an utterance is too long.
    """

    noise = noise_key = None

    def __init__(self, name, corpus, ids, labels, skipped):
        self.name, self.corpus, self.skipped = name, corpus, skipped
        self.ids, self.labels = ids, labels
        longest = int(corpus.samples.argmax())
        seconds = corpus.samples[longest] / data.SAMPLE_RATE
        if seconds > MAX_SECONDS:
            problem = f"{seconds:.0f} s, evaluations take up to {MAX_SECONDS} s; split it"
            raise ValueError(f"{self.path(longest)}: {problem}")

    def add_noise(self, folder, snr):
        """Mixes noise into utterances, the same at every reading. Raises ValueError, OSError."""
        self.noise = data.Noise(folder, snr)
        files = Cache("", self.noise.corpus)  # only for path(), which hashes the content
        contents = [files.path(i) for i in range(len(files.corpus))]
        self.noise_key = key(contents, self.noise.snr, self.corpus.paths)

    def path(self, i):
        return os.path.join(self.corpus.root, self.corpus.paths[i])

    def read(self, i):
        """The waveform of utterance i, (samples,). Raises ValueError naming the file."""
        try:
            waveform = self.corpus.read(i)
            return self.noise.mix(waveform, i) if self.noise else waveform
        except data.UNREADABLE as error:
            raise ValueError(f"{self.path(i)}: {error}; restore it") from None


# ------------------------------------------------------------------ training and scores


def evaluate(args, task, upstream, train, dev, test):
    """Trains one probe per learning rate on `train`, chooses rate and step on `dev`, scores `test`.

    All rates share the batches; on a CPU each gives bit for bit the result of a run of its own.
    Returns the result, which is also OUT/result.json; if that file exists, it is only read.
    """
    args.precision = upstream.precision  # to be compared on resume
    names = [name for name in vars(args) if name not in MAY_CHANGE]
    identity = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    identity |= {"upstream": upstream.digest, "symbols": key(task.symbols)}
    probes, optimizers = [], []
    with runs.one_line_errors():
        if args.noise:
            test.add_noise(args.noise, args.snr)
        identity["noise"] = test.noise_key
        for split in (train, dev, test):
            labels = [label.tolist() for label in split.labels]
            identity[split.name] = key(split.corpus.paths, split.corpus.samples.tolist(), labels)
        batches = data.TrainBatches(train.corpus, args.batch_size, args.seed)
        runs.lock(args.out)
        finished = os.path.join(args.out, "result.json")
        if os.path.exists(finished):
            with open(finished, encoding="utf-8") as file:
                result = json.load(file)
            runs.check_same(args.out, result.get("identity", {}), identity)
            print_result(args, result)
            return result
        run = {"identity": identity, "step": 0, "seconds": 0.0, "probes": [], "optimizers": []}
        run |= {"best": None, "curves": {f"{lr:g}": [] for lr in args.lr}}
        run = runs.load_latest(args.out, run.keys()) or run
        runs.check_same(args.out, run["identity"], identity)
        for lr in args.lr:
            torch.manual_seed(args.seed)  # the same initial weights at every rate
            probe = Probe(len(upstream.layers), task.head(upstream.dim)).to(upstream.device)
            probes.append(probe)
            optimizers.append(torch.optim.Adam(probe.parameters(), lr=lr, fused=True))
        for module, state in zip(probes + optimizers, run["probes"] + run["optimizers"]):
            module.load_state_dict(state)
        started = time.monotonic() - run["seconds"]
        stop = runs.StopSignal()
        counts = {}
        for split in (train, dev, test):
            counts[split.name] = {"utterances": len(split.ids), "skipped": len(split.skipped)}
            print(f"{split.name}: {split.corpus}, {len(split.skipped)} skipped")
            data.warn_skipped(split.skipped)
        print(f"upstream: {args.upstream}, {upstream.precision} on {upstream.device.type}")
        dataset_of = compute_states(args, upstream, (train, dev, test), stop)

    # ------------------------------ training
    print(f"{args.out}: from step {run['step']} of {args.steps}", flush=True)
    epochs = range(math.ceil(args.steps / batches.steps_per_epoch))
    plan = np.concatenate([batches.plan(epoch)[0] for epoch in epochs])[run["step"] : args.steps]
    loader = load_states(upstream, dataset_of[train], plan, args.workers, stop)
    losses, printed = [], time.monotonic()
    sign = 1 if task.higher_is_better else -1
    for step, indices, (states, frames) in zip(range(run["step"], args.steps), plan, loader):
        labels = [train.labels[i] for i in indices]
        runs.seed(args.seed, step)  # depends on these only: no RNG state to resume
        states = task.pool(states, frames, training=True)
        norms = []
        for probe, optimizer in zip(probes, optimizers):
            runs.seed(args.seed, step, 1)  # the same dropout at every rate
            loss = task.loss(probe(states, frames), frames, labels)
            loss.backward()
            losses.append(loss.item())
            norms.append(float(nn.utils.clip_grad_norm_(probe.parameters(), 1.0)))
            if math.isfinite(norms[-1]):  # a diverged rate is not updated
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run["step"] = step = step + 1
        if not any(map(math.isfinite, norms)):
            ids = ", ".join(train.ids[i] for i in indices)
            raise SystemExit(f"step {step}: the gradient is not finite at any rate; batch: {ids}")

        last = step == args.steps
        if last or step % args.log_every == 0:
            means = np.reshape(losses, (-1, len(probes))).mean(axis=0)
            speed = len(losses) / len(probes) / (time.monotonic() - printed)
            left = f"{speed:.3g} steps/s  {(args.steps - step) / speed / 60:.0f} min left"
            print(f"step {step}/{args.steps}  loss {means.round(4)}  {left}", flush=True)
            losses, printed = [], time.monotonic()
        if last or step % args.eval_every == 0:
            scored = score(args, task, upstream, probes, dataset_of[dev], stop)
            for lr, probe, (value, *_) in zip(args.lr, probes, scored):
                run["curves"][f"{lr:g}"].append([step, value])
                print(f"step {step}: {task.metric} {value:.2%} on {dev.name}, --lr {lr:g}")
                if not run["best"] or sign * value > sign * run["best"]["score"]:
                    weights = {name: w.cpu().clone() for name, w in probe.state_dict().items()}
                    run["best"] = {"score": value, "step": step, "lr": lr, "probe": weights}
        if last or step % args.eval_every == 0 or stop.number:
            run["seconds"] = time.monotonic() - started
            run["probes"] = [probe.state_dict() for probe in probes]
            run["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            runs.save(os.path.join(args.out, "last.pt"), run, keep_previous=True)
        if stop.number:
            print(f"{args.out}: stopped after step {step}; the same command resumes")
            raise SystemExit(128 + stop.number)

    # ------------------------------ result
    best, probe = run["best"], probes[0]
    probe.load_state_dict(best["probe"])
    (scored,) = score(args, task, upstream, [probe], dataset_of[test], stop)
    value, errors, references, hypotheses = scored
    result = {"task": task.name, "metric": task.metric, task.metric.lower(): value}
    result["interval"] = bootstrap(errors)
    result |= {"best_step": best["step"], "lr": best["lr"], "curves": run["curves"]}
    result["layer_weights"] = probe.weights.softmax(0).tolist()
    result["upstream"] = {"path": args.upstream, "layers": upstream.layers}
    result["noise"] = {"folder": args.noise, "snr": args.snr} if args.noise else None
    result |= {"counts": counts, "seconds": round(time.monotonic() - started, 2)}
    result |= {"settings": vars(args), "identity": identity, "torch": torch.__version__}
    if len(args.lr) > 1 and best["lr"] in (min(args.lr), max(args.lr)):
        runs.warn(f"the best --lr, {best['lr']:g}, is the lowest or highest; try others beyond it")
    for name, texts in (("ref", references), ("hyp", hypotheses)):
        lines = [" ".join([id, *text]) + "\n" for id, text in zip(test.ids, texts)]
        runs.write_text(os.path.join(args.out, f"test.{name}"), "".join(lines))
    runs.write_text(finished, json.dumps(result, indent=2))
    print_result(args, result)
    if stop.number:  # before the next fold
        raise SystemExit(128 + stop.number)
    return result


@torch.no_grad()
def score(args, task, upstream, probes, dataset, stop):
    """Per probe, (score, (errors, totals) per utterance, references, hypotheses).

    dataset: the cache.States of a Split.
    """
    split = dataset.split
    order = np.argsort(-split.corpus.samples, kind="stable")
    plan = np.split(order, range(args.batch_size, len(order), args.batch_size))
    references = [task.decode(label.tolist()) for label in split.labels]
    hypotheses = [[None] * len(order) for _ in probes]
    loader = load_states(upstream, dataset, plan, args.workers, stop)
    for indices, (states, frames) in zip(plan, loader):
        states = task.pool(states, frames, training=False)
        for probe, texts in zip(probes, hypotheses):
            predictions = task.predict(probe.eval()(states, frames), frames)
            for i, prediction in zip(indices, predictions):
                texts[i] = task.decode(prediction)
            probe.train()
    scored = []
    for texts in hypotheses:
        errors, totals = task.count(references, texts)
        scored.append((float(errors.sum() / totals.sum()), (errors, totals), references, texts))
    return scored


def bootstrap(*sets, resamples=10_000, seed=0):
    """95% interval, [low, high], of sum(errors) / sum(totals) over resampled utterances.

    sets: one (errors, totals) per test set, each (utterances,); the scores of several are averaged.
    Source: Bisani and Ney 2004, Bootstrap estimates for confidence intervals in ASR.
    """
    rng, scores = np.random.default_rng(seed), np.zeros(resamples)
    for errors, totals in sets:
        for resample in range(resamples):
            drawn = rng.integers(0, len(errors), len(errors))
            scores[resample] += errors[drawn].sum() / totals[drawn].sum() / len(sets)
    return np.percentile(scores, [2.5, 97.5]).tolist()


def print_result(args, result):
    """Prints the score with its interval, and the learned weights of the hidden states."""
    metric, (low, high) = result["metric"], result["interval"]
    if result["noise"]:
        print("test split: mixed with noise of {folder}, {snr} dB".format(**result["noise"]))
    print(f"{metric} {result[metric.lower()]:.2%}, 95% interval {low:.2%} to {high:.2%}")
    pairs = zip(result["upstream"]["layers"], result["layer_weights"])
    weights = ", ".join(f"{layer}: {weight:.2f}" for layer, weight in pairs)
    print(f"weights of the states: {weights}")
    print(f"{args.out}: result.json, test.hyp, test.ref", flush=True)
