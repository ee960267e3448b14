"""SUPERB's probe: a frozen upstream, a learned weighted sum of its hidden states, a small head.

Source: arXiv:2105.01051 and s3prl's downstream tasks. A task is a class with the attributes and
methods of PhonemeRecognition in evaluate_pr.py.
"""

import collections
import functools
import json
import math
import os
import time
import warnings

import numpy as np
import torch
from torch import nn

import checkpoint
import data
import manifest
import program
from cache import key
from superb.upstream import compute_states, load_states

CONTENT = ("identity", "step", "seconds", "probes", "optimizers", "best", "curves")  # of last.pt

# Settings that may differ when a run resumes.
MAY_CHANGE = {"out", "cache", "workers", "log_every"}
# Compared by content: weights, labels and noise, and of audio the paths and lengths.
MAY_CHANGE |= {"upstream", "data", "lexicon", "manifest", "noise", "snr"}

# 97.5% quantiles of Student's t, for 2 to 10 seeds.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def make_parser(description, task, **defaults):
    """The flags that all tasks share. task: sub-folder of --out; defaults: per flag."""
    parser = program.Parser(description.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--upstream", required=True,
        help="a student.pt or its folder, a teacher's name or path, or fbank")
    add("--data", default="data/LibriSpeech", help="folder of the corpus")
    add("--out", help="folder of the run; if not given, beside a student.pt or in runs")
    add("--steps", type=program.count, default=100_000, help="optimizer steps")
    add("--batch-size", type=program.count, default=32, help="utterances per step")
    add("--lr", type=program.numbers, default="1e-4",
        help="Adam's learning rates, one probe per rate")
    add("--lr-decay", action="store_true", help="decay each rate linearly to 0 over the steps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="as in train.py")
    add("--noise", metavar="DIR", help="folder of noise files, mixed into the test split")
    add("--snr", type=program.numbers, default="5", help="signal-to-noise ratio in dB, or low,high")
    add("--cache", metavar="DIR", help="folder of cached hidden states, for later runs too")
    add("--workers", type=program.whole, default=min(4, program.cores()),
        help="data-loading workers")
    add("--seed", type=program.whole, default=0,
        help="seed of initial weights, data order and dropout")
    add("--log-every", type=program.count, default=100, help="steps between lines of progress")
    add("--eval-every", type=program.count, default=1000,
        help="steps between scores and checkpoints")
    # fmt: on
    parser.set_defaults(task=task, **defaults)
    return parser


def main(parser, evaluate_upstream, arguments):
    """Reads the flags, and calls evaluate_upstream(args)."""
    program.init()
    with program.one_line_errors():
        args = parser.parse_args(arguments)
        if len(set(args.lr)) < len(args.lr):
            raise ValueError(f"--lr {args.lr}: a rate is given twice")
        if program.WORLD_SIZE > 1:
            raise ValueError("an evaluation is one process: run it without torchrun, unset RANK")
    student = os.path.join(args.upstream, "student.pt")
    if os.path.exists(student):  # --upstream is the folder of a run
        args.upstream = student
    folder, name = os.path.split(os.path.normpath(args.upstream))
    if name != "student.pt":
        folder = os.path.join("runs", os.path.splitext(name)[0])
    suffix = "-noise" if args.noise else ""
    args.out = args.out or os.path.join(folder, args.task + suffix)
    evaluate_upstream(args)


# ------------------------------------------------------------------ networks


class Probe(nn.Module):
    """All that is trained: one weight per hidden state, and the head of a task."""

    def __init__(self, state_count, head):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(state_count))
        self.head = head

    def forward(self, states, frames):
        """states: (states, batch, frames, dim); frames: (batch,)."""
        return self.head(torch.tensordot(self.weights.softmax(0), states, dims=1), frames)


class LinearHead(nn.Module):
    """Two linear layers, for phonemes, speakers and emotions.

    Source: s3prl's downstream/ctc/libriphone.yaml, and UtteranceLevel with MeanPooling.
    """

    def __init__(self, dim, outputs):
        super().__init__()
        self.projection = nn.Linear(dim, 256)
        self.output = nn.Linear(256, outputs)

    def forward(self, x, frames):
        """x: (..., dim); frames has no effect. Returns logits, (..., outputs)."""
        return self.output(self.projection(x))


class Sweep:
    """One probe and optimizer per learning rate, from the newest checkpoint of OUT if there is one.

    step: number of steps so far. curves: {rate: [[step, score on dev], ...]}.
    best: score, step, rate and weights of the best probe on dev; None before the first scores.
    Raises ValueError if the checkpoint is that of another run.
    """

    def __init__(self, args, task, upstream, identity):
        self.args, self.task, self.upstream, self.identity = args, task, upstream, identity
        self.probes, self.optimizers = [], []
        for lr in args.lr:
            torch.manual_seed(args.seed)  # the same initial weights at every rate
            probe = Probe(len(upstream.layers), task.head(upstream.dim)).to(upstream.device)
            self.probes.append(probe)
            self.optimizers.append(torch.optim.Adam(probe.parameters(), lr=lr, fused=True))
        self.step, self.best, self.started = 0, None, time.monotonic()
        self.curves = {f"{lr:g}": [] for lr in args.lr}
        saved = checkpoint.load_latest(args.out, CONTENT)
        if saved:
            # Noise is only in the test split, so that probes may be scored with another.
            unchanged = identity | {"noise": saved["identity"].get("noise")}
            checkpoint.check_same(args.out, saved["identity"], unchanged)
            self.step, self.best = saved["step"], saved["best"]
            self.curves = saved["curves"]
            self.started -= saved["seconds"]
            saved_dicts = saved["probes"] + saved["optimizers"]
            for trained, state_dict in zip(self.probes + self.optimizers, saved_dicts):
                trained.load_state_dict(state_dict)

    def seconds(self):
        """Seconds of this run, also before it was stopped."""
        return time.monotonic() - self.started

    def update(self, states, frames, labels, ids):
        """One optimizer step per probe. Returns the losses, [float].

        A probe whose gradient is not finite is not updated. If none is finite, raises RuntimeError
        naming utterances of the batch, of which `ids` are the names.
        """
        args, losses, norms = self.args, [], []
        for lr, probe, optimizer in zip(args.lr, self.probes, self.optimizers):
            if args.lr_decay:
                optimizer.param_groups[0]["lr"] = lr * (args.steps - self.step) / args.steps
            # The same dropout at every rate; no RNG state to resume.
            program.seed(args.seed, self.step)
            loss = self.task.loss(probe.train()(states, frames), frames, labels)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(probe.parameters(), 1.0)))
            losses.append(loss.item())
            if math.isfinite(norms[-1]):
                optimizer.step()
            optimizer.zero_grad()
        if not any(map(math.isfinite, norms)):
            problem = "the gradient is not finite at any rate; lower it, or check the batch"
            raise RuntimeError(f"step {self.step + 1}: {problem}: {', '.join(ids[:3])}, ...")
        self.step += 1
        return losses

    def score_dev(self, dev, stop):
        """Scores every probe on dev, prints the scores, and copies the weights of a new best."""
        references, per_probe = predict(self.args, self.task, self.upstream, self.probes, dev, stop)
        metric, sign = self.task.metric, 1 if self.task.higher_is_better else -1
        for lr, probe, hypotheses in zip(self.args.lr, self.probes, per_probe):
            errors, totals = self.task.count(references, hypotheses)
            score = float(errors.sum() / totals.sum())
            self.curves[f"{lr:g}"].append([self.step, score])
            program.say(f"step {self.step}: {metric} {score:.2%} on {dev.name}, --lr {lr:g}")
            if not self.best or sign * score > sign * self.best["score"]:
                weights = {name: w.cpu().clone() for name, w in probe.state_dict().items()}
                self.best = {"score": score, "step": self.step, "lr": lr, "probe": weights}

    def save(self):
        saved = {"identity": self.identity, "step": self.step, "seconds": self.seconds()}
        saved["probes"] = [probe.state_dict() for probe in self.probes]
        saved["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        saved |= {"best": self.best, "curves": self.curves}
        checkpoint.save(os.path.join(self.args.out, "last.pt"), saved, keep_previous=True)


# ------------------------------------------------------------------ evaluation


def evaluate(args, task, upstream, train, dev, test):
    """Trains one probe per learning rate on `train`, selects on `dev`, scores on `test`.

    The rates share the batches; on a CPU each probe equals, bit for bit, one trained alone.
    Returns the result, which is also OUT/result.json; if that file exists, it is only read.
    """
    args.precision = upstream.precision  # auto becomes bf16 or fp32, to be compared on resume
    splits = [train, dev, test]
    with program.one_line_errors():
        if args.noise:
            test.add_noise(args.noise, args.snr)
        identity = identify(args, task, upstream, splits)
        batches = data.TrainBatches(train.corpus, args.batch_size, args.seed)
        checkpoint.lock(args.out)
        result = checkpoint.read_json(os.path.join(args.out, "result.json"))
        if result:
            checkpoint.check_same(args.out, result.get("identity", {}), identity)
            print_result(args, result)
            return result
        sweep = Sweep(args, task, upstream, identity)
        stop = program.StopSignal()
        for split in splits:
            print(f"{split.name}: {split.corpus}, {len(split.skipped)} skipped")
            manifest.warn_skipped(split.skipped)
        symbols = ", ".join(task.symbols[:8]) + ", ..." * (len(task.symbols) > 8)
        print(f"symbols: {len(task.symbols)}: {symbols}")
        print(f"upstream: {args.upstream}, {upstream.precision} on {upstream.device.type}")
        is_trained = sweep.step == args.steps
        compute_states(args, upstream, [test] if is_trained else splits, stop)
    train_probes(sweep, batches, train, dev, stop)
    return score_best(sweep, splits, stop)


def identify(args, task, upstream, splits):
    """What is compared when a run resumes: {setting: value}, hashes for content.

    Raises ValueError if a file is in two splits.
    """
    files = [os.path.realpath(split.path(i)) for split in splits for i in range(len(split.ids))]
    file, times = collections.Counter(files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{file}: used twice in {', '.join(split.name for split in splits)}")
    names = [name for name in vars(args) if name not in MAY_CHANGE]
    identity = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    identity |= {"upstream": upstream.digest, "symbols": key(task.symbols)}
    identity["noise"] = splits[-1].noise_key
    for split in splits:
        lengths = split.corpus.samples.tolist()
        labels = [label.tolist() for label in split.labels]
        identity[split.name] = key(list(split.corpus.paths()), lengths, labels)
    return identity


def train_probes(sweep, batches, train, dev, stop):
    """Trains the probes of a Sweep to the last step; exits on a signal, after saving.

    batches: the TrainBatches of the split `train`.
    """
    args = sweep.args
    print(f"{args.out}: from step {sweep.step} of {args.steps}", flush=True)
    epochs = range(math.ceil(args.steps / batches.steps_per_epoch))
    plan = np.concatenate([batches.plan(epoch)[0] for epoch in epochs])[sweep.step : args.steps]
    loader = load_states(sweep.upstream, train, plan, args.workers, stop)
    progress = program.Progress("step", args.steps, sweep.step)
    losses = []
    for indices, (states, frames) in zip(plan, loader):
        labels, ids = [train.labels[i] for i in indices], [train.ids[i] for i in indices]
        losses.append(sweep.update(states, frames, labels, ids))
        step, stopping = sweep.step, stop.number > 0
        is_last = step == args.steps
        if is_last or step % args.log_every == 0:
            means = np.mean(losses, axis=0).round(4)
            program.say(f"step {step}/{args.steps}  loss {means}  {progress.left(step)}")
            losses, progress.printed = [], time.monotonic()
        else:
            progress.show(step)
        score_now = is_last or step % args.eval_every == 0
        if score_now:
            sweep.score_dev(dev, stop)
        if score_now or stopping:
            sweep.save()
        if stopping:
            program.say(f"{args.out}: stopped after step {step}; the same command resumes")
            raise SystemExit(128 + stop.number)


def score_best(sweep, splits, stop):
    """The result of the best probe on the test split; writes test.ref, test.hyp and result.json."""
    args, task, upstream = sweep.args, sweep.task, sweep.upstream
    best, probe, test = sweep.best, sweep.probes[0], splits[-1]
    probe.load_state_dict(best["probe"])
    references, [hypotheses] = predict(args, task, upstream, [probe], test, stop)
    errors, totals = task.count(references, hypotheses)
    result = {"task": task.name, "metric": task.metric}
    # Per test set, counts of errors (or correct answers) and totals; er.py has several sets.
    result["per_utterance"] = [[errors.tolist(), totals.tolist()]]
    result["test_set"] = key(test.ids, references, test.noise_key)
    result |= {"best_step": best["step"], "lr": best["lr"], "curves": sweep.curves}
    result["layer_weights"] = probe.weights.softmax(0).tolist()
    result["upstream"] = {"path": args.upstream, "layers": upstream.layers}
    result["noise"] = {"folder": args.noise, "snr": args.snr} if args.noise else None
    result["counts"] = {split.name: split.counts for split in splits}
    result["seconds"] = round(sweep.seconds(), 2)
    result |= {"settings": vars(args), "identity": sweep.identity, "torch": torch.__version__}
    if len(args.lr) > 2 and best["lr"] in (min(args.lr), max(args.lr)):
        message = f"the best --lr, {best['lr']:g}, is the lowest or highest; try others beyond it"
        warnings.warn(message)
    for name, texts in (("ref", references), ("hyp", hypotheses)):
        lines = [" ".join([id, *text]) + "\n" for id, text in zip(test.ids, texts)]
        checkpoint.save(os.path.join(args.out, f"test.{name}"), "".join(lines))
    write_result(args, result)
    return result


@torch.no_grad()
def predict(args, task, upstream, probes, split, stop):
    """(references, a list of hypotheses per probe): per utterance, the symbols of task.decode."""
    order = np.argsort(-split.corpus.samples, kind="stable")
    plan = np.split(order, range(args.batch_size, len(order), args.batch_size))
    per_probe = [[None] * len(order) for _ in probes]
    loader = load_states(upstream, split, plan, args.workers, stop)
    progress = program.Progress(f"scoring {split.name}", len(plan))
    for number, (indices, (states, frames)) in enumerate(zip(plan, loader), start=1):
        progress.show(number)
        for probe, hypotheses in zip(probes, per_probe):
            predictions = task.predict(probe.eval()(states, frames), frames)
            for i, prediction in zip(indices, predictions):
                hypotheses[i] = task.decode(prediction)
    return [task.decode(label.tolist()) for label in split.labels], per_probe


# ------------------------------------------------------------------ intervals and results


def bootstrap(per_utterance):
    """(4001,) scores: of the utterances, and of 4,000 bootstrap resamples of them.

    per_utterance: per test set, (2, utterances) errors and totals; the test sets are averaged.
    The draws are the same in every call, so that the difference of two upstreams is paired.
    Source: Bisani and Ney 2004, Bootstrap estimates for confidence intervals in ASR.
    """
    scores = []
    for stream, counts in enumerate(per_utterance, start=1):
        counts = np.array(counts, np.float32)  # errors and totals
        errors, totals = (counts @ draws(counts.shape[1], stream).T).astype(float)
        scores.append(errors / totals)
    return np.mean(scores, axis=0)


@functools.cache
def draws(count, stream, resamples=4000):
    """(1 + resamples, count) float32: how often each item is drawn; row 0 is all ones."""
    rng = np.random.default_rng(stream)
    drawn = rng.multinomial(count, np.full(count, 1 / count), resamples)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.float32)


def mean_and_interval(seeds):
    """(3,): the mean over seeds, and the ends of its 95% interval.

    seeds: per seed, the bootstrap() of a result, or the difference of two.
    The spread over utterances is that of the resamples. Seeds are too few to resample: the spread
    over them is by Student's t. Both are added in quadrature. Noise that depends on utterance and
    seed is in both, which makes the interval too wide. One seed shows only the utterances' spread.
    """
    scores = np.mean(seeds, axis=0)
    offsets = np.percentile(scores, [2.5, 97.5]) - scores[0]
    if len(seeds) > 1:
        standard_error = np.std([seed[0] for seed in seeds], ddof=1) / math.sqrt(len(seeds))
        t = STUDENT_T[min(len(seeds), 10) - 2]  # of more than 10 seeds: slightly too wide
        offsets = [-1, 1] * np.hypot(offsets, t * standard_error)
    return scores[0] + np.array([0, *offsets])


def write_result(args, result):
    """Writes OUT/result.json, one line per entry, and prints it.

    The score and its interval are added: those of result["per_utterance"].
    """
    score, low, high = mean_and_interval([bootstrap(result["per_utterance"])]).tolist()
    result |= {result["metric"].lower(): score, "interval": [low, high]}
    entries = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
    path = os.path.join(args.out, "result.json")
    checkpoint.save(path, "{\n" + ",\n".join(entries) + "\n}\n")
    print_result(args, result)


def print_result(args, result):
    """Prints the score with its interval, and the learned weights of the hidden states."""
    metric, (low, high) = result["metric"], result["interval"]
    if result["noise"]:
        snr = " to ".join(f"{ratio:g}" for ratio in result["noise"]["snr"])
        print(f"test split: mixed with noise of {result['noise']['folder']}, {snr} dB")
    test = list(result["counts"].values())[-1]  # train, dev, test
    score = f"{metric} {result[metric.lower()]:.2%} over {test['utterances']:,} utterances"
    print(f"{score}, 95% interval {low:.2%} to {high:.2%}")
    pairs = zip(result["upstream"]["layers"], result["layer_weights"])
    weights = ", ".join(f"{layer}: {weight:.2f}" for layer, weight in pairs)
    print(f"weights of the states: {weights}")
    print(f"{args.out}/result.json: the result", flush=True)
