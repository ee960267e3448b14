"""SUPERB's probe: the frozen upstream, the weighted sum of its hidden states, and the training of the little that learns.

Protocol: SUPERB, arXiv:2105.01051, after s3prl's downstream tasks. The upstream never learns:

    waveforms -> upstream    states  (states, batch, frames, dim)
      -> Probe: softmax-weighted sum of the states, then a task's head -> outputs -> its loss

What a task is stands in its evaluate_*.py; how states are kept, in states.py.
"""

import processes

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import time

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn

import data
import report
from safe_files import check_settings, claimed, newest_save, write_whole
from states import AT_ONCE, States, by_length, keep_states, worth_keeping
from student import load_student
from teachers import TEACHERS, digest, load_teacher

FORMAT = "ekd-probe-3"  # the first had one learning rate, the second one optimizer for all of them
# Settings that may change when a run is resumed. Upstream and data are known by what they are, not by their paths.
FREE = {"out", "cache", "cache_memory", "workers", "log_every", "plan", "upstream", "data", "lexicon", "manifest"}


# ---------------------------------------------------------------- the frozen upstream


class FilterBanks(nn.Module):
    """SUPERB's baseline `fbank`: 80 log Mel filter banks with deltas and delta-deltas, a frame each 10 ms.

    Every dimension has zero mean and unit variance over the utterance.
    Source: s3prl's upstream/baseline/fbank.yaml and extracter.py.
    """

    def frames(self, samples):
        """Number of frames that `samples` (int or integer tensor) give: windows of 25 ms that lie wholly inside."""
        count = (samples - 400) // 160 + 1
        return count.clamp(min=0) if torch.is_tensor(samples) else max(count, 0)

    def forward(self, waveforms, lengths, layers=None):
        """waveforms (batch, samples) at 16 kHz; lengths in samples; layers: there is one state. Returns [(batch, frames, 240)], 0 past an utterance's end."""
        states = waveforms.new_zeros(len(waveforms), self.frames(waveforms.shape[1]), 240)
        for row, waveform, length in zip(states, waveforms, lengths.tolist()):
            row[: self.frames(length)] = self.features(waveform[:length])
        return [states]

    def features(self, waveform):
        """(samples,) at 16 kHz to (frames, 240)."""
        x = torchaudio.compliance.kaldi.fbank(waveform[None], num_mel_bins=80, sample_frequency=16000)
        delta = torchaudio.functional.compute_deltas(x.t())
        x = torch.cat([x, delta.t(), torchaudio.functional.compute_deltas(delta).t()], dim=1)
        # A floor that s3prl lacks: there, a band that is silent throughout becomes loud rounding noise.
        return (x - x.mean(0)) / x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-5)


class Upstream:
    """A frozen encoder in eval mode.

    path: a student.pt, a teacher's name or checkpoint in any form that load_teacher knows, or "fbank".
    which: the hidden states given, "all", "last" (DistilHuBERT's protocol), or a list of them.
    precision: "fp32", "bf16" for autocast, or "auto": bf16 where the device computes in it.
    states, dim: how many hidden states it gives, and their width; layers: which those are. parameters: its weights.
    digest: changes with any of them; name: of its kept states.
    Raises FileNotFoundError, OSError and ValueError with one line.
    """

    def __init__(self, path, device="cpu", precision="auto", which="all"):
        self.device = torch.device(device)
        self.precision = processes.precision(precision, self.device)
        self.encoder = _load_encoder(path, self.device)
        self.frames = self.encoder.frames
        self.parameters = sum(weight.numel() for weight in self.encoder.parameters())
        if path == "fbank":
            last, self.dim, self.digest = 0, 240, hashlib.sha256(b"fbank").hexdigest()[:16]
        else:
            config = self.encoder.config
            last, self.dim, self.digest = config.layers, config.dim, digest(self.encoder)
        self.layers = (
            {"all": list(range(last + 1)), "last": [last]}.get(which, which) if isinstance(which, str) else which
        )
        if max(self.layers) > last:
            raise ValueError(f"--states {max(self.layers)}: {path} has hidden states 0 to {last}")
        self.states, stem = len(self.layers), os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
        self.name = f"{stem}-{self.digest}-{self.precision}"
        if self.states <= last:
            self.name += f"-states-{'-'.join(map(str, self.layers))}"

    @torch.no_grad()
    def __call__(self, waveforms, lengths):
        """Hidden states, (states, batch, frames, dim); an utterance's are those it has alone, and 0 past its end.

        waveforms: (batch, samples) at 16 kHz, on the device; lengths: samples of each, (batch,), on the host.
        In bfloat16, whether they are kept or not, so that a score does not depend on where there was room.
        """
        count, states = max(1, AT_ONCE // waveforms.shape[1]), []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for part in zip(waveforms.split(count), lengths.split(count)):
                states.append(torch.stack([state.bfloat16() for state in self.encoder(*part, layers=self.layers)]))
        return torch.cat(states, dim=1)


def _load_encoder(path, device):
    if path == "fbank":
        return FilterBanks()
    if path in TEACHERS or os.path.isdir(path):
        return load_teacher(path, device)
    if not os.path.exists(path):
        known = ", ".join(TEACHERS)
        raise FileNotFoundError(f"{path}: no such upstream; give a student.pt, a checkpoint, fbank, or a name: {known}")
    try:
        return load_student(path, device).encoder.requires_grad_(False)
    except ValueError:  # no student: a teacher's checkpoint
        return load_teacher(path, device)


class Probe(nn.Module):
    """All that learns: a weight for each hidden state, and a task's head.

    Source: the featurizer of SUPERB, arXiv:2105.01051, section 3.
    """

    def __init__(self, states, head):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))
        self.head = head

    def forward(self, states, frames):
        """states: (states, batch, frames, dim); frames: (batch,), on the host, how many each utterance has. Returns the
        head's outputs."""
        return self.head(torch.tensordot(self.weights.softmax(0), states, dims=1), frames)


# ---------------------------------------------------------------- utterances with labels


class Split:
    """Labelled utterances of a corpus.

    name: for messages. corpus: a data.Corpus; places: which of its utterances, in order; ids: [str], labels: [tensor],
    for each of those. left_out: {ID: reason} of the utterances that cannot be used.
    """

    def __init__(self, name, corpus, places, ids, labels, left_out):
        self.name, self.corpus, self.places = name, corpus, np.asarray(places)
        self.ids, self.labels, self.left_out = ids, labels, left_out
        self.number = {int(place): number for number, place in enumerate(places)}
        self.samples = corpus.samples[self.places]

    def some(self, count):
        """A Split of so many of the utterances, or all, from its beginning to its end."""
        mine = np.unique(np.linspace(0, len(self.ids) - 1, count).astype(int))
        corpus, ids = self.corpus.part(self.places[mine]), [self.ids[place] for place in mine]
        return Split(self.name, corpus, range(len(mine)), ids, [self.labels[place] for place in mine], {})

    def fingerprint(self):
        """Changes with any utterance's path, length or label."""
        text = self.corpus.part(self.places).fingerprint() + str([label.tolist() for label in self.labels])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Shuffled:
    """A split's training batches, as places in its corpus: [step] gives utterances of similar length, each at most once an
    epoch, by seed and step alone."""

    def __init__(self, split, batch_size, seed):
        self.places = split.places
        self.of_epoch = data.Batches(split.corpus.part(split.places), batch_size, int(split.samples.max()), seed)
        self.epoch = None

    def __getitem__(self, step):
        epoch, row = divmod(step, self.of_epoch.steps_an_epoch)
        if epoch != self.epoch:
            self.epoch, (self.utterances, _, _) = epoch, self.of_epoch.plan(epoch)
        return self.places[self.utterances[row]]


# ---------------------------------------------------------------- settings


def parser(description, splits=None):
    """The settings that all evaluations have. splits: the default of --splits, or None for a task without them."""
    parser = processes.parser(description)
    add = parser.add_argument
    # fmt: off
    add("--upstream", help="what is judged: a student.pt, a teacher's name or checkpoint, or fbank (SUPERB's baseline)")
    add("--data", default="data/LibriSpeech", help="folder of the corpus")
    if splits:
        add("--splits", type=processes.names, default=splits, help="sub-folders of --data to train, choose the best step, and test on")
    add("--out", help="folder of the run (default: beside a student.pt, else runs/ and the upstream's name)", default=argparse.SUPPRESS)
    add("--steps", type=processes.count, default=100_000, help="optimizer steps")
    add("--batch-size", type=processes.count, default=32, help="utterances a step")
    add("--lr", type=processes.rates, default=1e-4, help="learning rate of Adam, or several with commas, tried on the same states; SUPERB tries 1e-1,1e-2,1e-3,1e-4,1e-5 for each upstream")
    add("--states", type=processes.states, default="all", help="hidden states that the probe sees: all, last, or some of them such as 0,4,12")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="autocast of the upstream; auto is bf16 where the device computes in it")
    add("--cache", metavar="DIR", default=None, help="keep the upstream's states in files there, for this run and others")
    add("--cache-memory", type=processes.share, default=0.5, help="without --cache: share of the free memory that states may take; if they need more, they are computed for every batch again")
    add("--workers", type=processes.whole, default=argparse.SUPPRESS, help="processes that read audio or states (default: up to 4)")
    add("--seed", type=processes.seed, default=0, help="of the probe's first weights and the data's order")
    add("--log-every", type=processes.count, default=100, help="steps between lines of progress")
    add("--eval-every", type=processes.count, default=1000, help="steps between scores on the second split, each one saved")
    add("--plan", action="store_true", help="say what the run would take here, from four of its steps, and stop")
    add("--demo", action="store_true", help="synthetic speech and the demo's student")
    # fmt: on
    return parser


def finish(args, task):
    """Checks the settings that all evaluations have, and fills in those that depend on others."""
    if processes.WORLD_SIZE > 1:
        processes.stop("runs as one process; start it with python, not torchrun")
    if not args.upstream:
        processes.stop("argument --upstream: missing; give a student.pt, a teacher's name or checkpoint, or fbank")
    if os.path.isfile(os.path.join(args.upstream, "student.pt")):  # the folder of a run
        args.upstream = os.path.join(args.upstream, "student.pt")
    if len(getattr(args, "splits", "123")) != 3:
        three = "three are needed, to train, to choose the best step, to test"
        processes.stop(f"argument --splits: {','.join(args.splits)}: {three}")
    if not hasattr(args, "out"):
        folder, name = os.path.split(os.path.normpath(args.upstream))
        args.out = os.path.join(folder if name == "student.pt" else f"runs/{os.path.splitext(name)[0]}", task)
    if not hasattr(args, "workers"):
        args.workers = min(4, processes.cores())
    args.workers = processes.readers(args.workers)
    return args


# ---------------------------------------------------------------- training


def evaluate(
    args,
    upstream,
    splits,
    *,
    symbols,
    metric,
    make_head,
    loss,
    decode,
    count,
    pool=None,
    states=None,
    higher_is_better=False,
    runs=1,
):
    """Trains a probe on the first split, takes its best step on the second, and scores that step on the third.

    symbols: names of what the labels number. make_head(dim): an nn.Module, (batch, frames, dim) and frames (batch,) to outputs.
    loss(outputs, frames, labels): one number. decode(outputs, frames): a prediction for each utterance.
    count(labels, predictions): two (utterances,) arrays, whose sums' quotient is the score named `metric`.
    pool(states, frames, training): what the head needs of the states, (states, batch, ..., dim), if not all frames.
    states: {corpus: States} of the splits, where they are kept already. runs: how many such probes the program trains.
    Returns (the result so far, a dict, and the predictions on the third split), or, where the run was finished before,
    (its whole result, None). Started again after an interruption, it goes on where it was.
    """
    states = states or {split.corpus: States(upstream, split.corpus) for split in splits}
    args.precision = upstream.precision  # "auto" resolved: a resume on another device is told
    if args.plan:
        expect(args, upstream, splits, states, make_head, loss, decode, count, pool, runs)
    fingerprints = {"upstream": upstream.digest} | {split.name: split.fingerprint() for split in splits}
    fingerprints["symbols"] = hashlib.sha256("\n".join(symbols).encode()).hexdigest()[:16]
    with processes.together():
        run = load_run(args, fingerprints)
        finished = os.path.join(args.out, "result.json")
        if run and run["progress"]["scored"] == args.steps and os.path.exists(finished):
            print(f"{args.out}: finished, {args.steps:,} steps; give --out another folder for another run")
            with open(finished, encoding="utf-8") as file:
                return json.load(file), None
        plan = Shuffled(splits[0], args.batch_size, args.seed)
        os.makedirs(args.out, exist_ok=True)

    rates, probes, optimizers, progress = start(args, upstream, make_head)
    if run:
        for probe, optimizer, weights, moments in zip(probes, optimizers, run["probes"], run["optimizers"]):
            probe.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        progress = run["progress"]
        print(f"{args.out}: resuming after step {progress['step']:,} of {args.steps:,}", flush=True)
    save = functools.partial(save_run, args, fingerprints, probes, optimizers, progress)

    def scores(split, probes, asked):
        """(predictions, parts, totals) of each probe."""
        with _timed(progress["seconds"], "scoring"):
            found = predict(probes, split, states[split.corpus], decode, args.batch_size, args.workers, asked, pool)
            return [(predictions, *count(split.labels, predictions)) for predictions in found]

    with contextlib.ExitStack() as stack:
        with processes.together():
            stack.enter_context(claimed(args.out))
        asked = stack.enter_context(processes.signals())
        try:
            with processes.together(), _timed(progress["seconds"], "states"):
                keep_states(args, upstream, states, splits, progress["scored"] < args.steps, asked)
            for step in train(args, probes, optimizers, progress, states, splits[0], plan, loss, pool, asked):
                save()
                found = scores(splits[1], probes, asked)
                for rate, mine, probe, (_, part, total) in zip(rates, progress["rates"], probes, found):
                    remark = note_score(mine, step, float(part.sum() / total.sum()), probe, higher_is_better)
                    at = f" at --lr {rate:g}" if len(rates) > 1 else ""
                    score = f"{metric} {mine['curve'][-1][1]:.2%} on {splits[1].name}"
                    print(f"step {step}: {score}{at}{remark}", flush=True)
                progress["scored"] = step
                save()
            best = (max if higher_is_better else min)(mine["best"]["score"] for mine in progress["rates"])
            chosen = next(place for place, mine in enumerate(progress["rates"]) if mine["best"]["score"] == best)
            probe, mine = probes[chosen], progress["rates"][chosen]
            probe.load_state_dict(mine["best"]["probe"])
            ((predictions, part, total),) = scores(splits[2], [probe], asked)
        except processes.Interrupted as interrupted:
            # The best probe is loaded only after the last save.
            if progress["scored"] < progress["step"]:
                save()
            where = f"interrupted after step {progress['step']} of {args.steps}"
            processes.stop(f"{where}; the same command resumes", 128 + interrupted.args[0])

    result = {"metric": metric, metric.lower(): float(part.sum() / total.sum())}
    result |= {"interval": report.bootstrap((part, total)), "best_step": mine["best"]["step"], "curve": mine["curve"]}
    if len(rates) > 1:
        result |= {"lr": rates[chosen], "curves": {f"{r:g}": m["curve"] for r, m in zip(rates, progress["rates"])}}
        if rates[chosen] in (min(rates), max(rates)):
            processes.warn(f"the best --lr, {rates[chosen]:g}, is at the edge of those tried; try others beyond it")
    result |= {"layer_weights": probe.weights.detach().softmax(0).tolist(), "counts": {}}
    for split in splits:
        seconds = round(float(split.samples.sum()) / data.SAMPLE_RATE, 2)
        counts = {"utterances": len(split.ids), "seconds": seconds, "left_out": len(split.left_out)}
        result["counts"][split.name] = counts
    result["upstream"] = {"path": args.upstream, "states": upstream.states, "dim": upstream.dim}
    result["upstream"] |= {
        "layers": upstream.layers,
        "parameters": upstream.parameters,
        "digest": upstream.digest,
        "precision": upstream.precision,
        "device": upstream.device.type,
    }
    result["seconds"] = {what: round(spent, 2) for what, spent in progress["seconds"].items()}
    result["settings"] = vars(args)
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    result["versions"] |= {"torchaudio": torchaudio.__version__, "soundfile": soundfile.__version__}
    return result, predictions


def start(args, upstream, make_head):
    """(rates, probes, optimizers, progress) of a run before its first step."""
    rates, probes = args.lr if isinstance(args.lr, list) else [args.lr], []
    for _ in rates:  # each as it would start alone
        torch.manual_seed(args.seed)
        probes.append(Probe(upstream.states, make_head(upstream.dim)).to(upstream.device))
    # fused: each can be told on the device to change nothing
    optimizers = [torch.optim.Adam(probe.parameters(), lr=rate, fused=True) for rate, probe in zip(rates, probes)]
    # scored: the step last scored on the second split; curve: [step, score] of each so far, of every rate.
    progress = {"step": 0, "scored": 0, "rates": [{"curve": [], "best": None} for _ in rates]}
    progress["seconds"] = {"states": 0.0, "training": 0.0, "scoring": 0.0}
    return rates, probes, optimizers, progress


def train(args, probes, optimizers, progress, states, split, plan, loss, pool, asked):
    """The steps that are left; yields the number of each after which a score is due, one that was missed first.

    Every probe, one a learning rate, learns from the same states, brought once. progress["step"] counts the steps,
    progress["scored"] is the caller's. The host asks the device for nothing but where a line or a score is due.
    """
    loader = states[split.corpus].batches(plan, progress["step"], args.steps, args.workers)
    device = probes[0].weights.device
    total, since, begun = torch.zeros((), device=device), time.monotonic(), progress["step"]
    stop_at = torch.zeros((), device=device)  # the first step at which no probe's loss was finite
    while progress["scored"] < args.steps:
        step = progress["step"]
        due = step > progress["scored"] and (step % args.eval_every == 0 or step == args.steps)
        with _timed(progress["seconds"], "training"):  # a GPU is waited for here
            sick = (due or asked or step % args.log_every == 0) and int(stop_at)
        if sick:
            ids = ", ".join(split.ids[split.number[place]] for place in plan[sick - 1])
            processes.stop(f"step {sick}: the loss is not finite; utterances of the batch: {ids}")
        if due:
            yield step
            total, since, begun = torch.zeros_like(total), time.monotonic(), step
            continue
        processes.heed(asked)
        with _timed(progress["seconds"], "training"):
            processes.reseed(args.seed, step)
            utterances, x, frames = next(loader)
            labels = [split.labels[split.number[place]] for place in utterances]
            if pool:
                x = pool(x, frames, training=True)
            values = []
            for probe in probes:
                processes.reseed(args.seed, step, 1)  # a head's dropout is the same at every rate
                value = loss(probe(x, frames), frames, labels)
                value.backward()
                values.append(value.detach())
            norms = [nn.utils.clip_grad_norm_(probe.parameters(), 1.0) for probe in probes]
            values = torch.stack(values)
            finite = torch.isfinite(values + torch.stack(norms))
            stop_at = torch.where(finite.any() | (stop_at > 0), stop_at, step + 1)
            for optimizer, fine in zip(optimizers, finite):  # a rate that is too high: its probe stays where it is
                optimizer.found_inf = (~fine | (stop_at > 0)).float()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total += values.masked_fill(~finite, torch.inf).min()
        progress["step"] = step = step + 1
        if (step % args.log_every == 0 or step == args.steps) and not stop_at:
            each = (time.monotonic() - since) / (step - begun)
            left = f"{1 / each:.3g} steps/s  {report.clock(each * (args.steps - step))} left"
            place = f"step {step:>{len(str(args.steps))}}/{args.steps}"
            print(f"{place}  loss {total.item() / (step - begun):.4f}  {left}", flush=True)
            total, since, begun = torch.zeros_like(total), time.monotonic(), step


def predict(probes, split, states, decode, batch_size, workers=0, asked=(), pool=None):
    """For each probe a prediction for each utterance of a split, in its order; the same for any batch size."""
    order, predictions = split.places[by_length(split.samples)], [[None] * len(split.ids) for _ in probes]
    plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with torch.no_grad():
        for utterances, x, frames in states.batches(plan, workers=workers):
            if pool:
                x = pool(x, frames, training=False)
            for probe, mine in zip(probes, predictions):
                for place, prediction in zip(utterances, decode(probe.eval()(x, frames), frames)):
                    mine[split.number[place]] = prediction
            processes.heed(asked)
    for probe in probes:
        probe.train()
    return predictions


def note_score(progress, step, score, probe, higher_is_better=False):
    """Takes a score on the second split down, with the probe where it is the best so far; returns a remark on it."""
    progress["curve"].append([step, score])
    best = progress["best"]
    if best and (score <= best["score"] if higher_is_better else score >= best["score"]):
        return ""
    weights = {name: weight.detach().cpu().clone() for name, weight in probe.state_dict().items()}
    progress["best"] = {"step": step, "score": score, "probe": weights}
    return ", the best so far"


def expect(args, upstream, splits, states, make_head, loss, decode, count, pool, runs):
    """Says what the run would take and ends the program: four steps on a batch of each split, carried over to the whole."""
    kept, where = worth_keeping(args, upstream, states, splits)
    print(where, flush=True)
    for batch, steps in (2, 1), (args.batch_size, 4):  # the first pays for what is loaded once
        some = [split.some(batch) for split in splits]
        mine = {split.corpus: States(upstream, split.corpus) for split in some}
        trial = {"batch_size": len(some[0].ids), "steps": steps, "eval_every": steps, "workers": 0}
        trial = argparse.Namespace(**vars(args) | trial)
        plan = Shuffled(some[0], trial.batch_size, args.seed)
        _, probes, optimizers, progress = start(trial, upstream, make_head)
        seconds = progress["seconds"]
        with contextlib.redirect_stdout(io.StringIO()):
            with _timed(seconds, "states"):
                for split in some:
                    mine[split.corpus].keep(None, split.name, trial.batch_size)
            for step in train(trial, probes, optimizers, progress, mine, some[0], plan, loss, pool, ()):
                progress["scored"] = step
        with _timed(seconds, "scoring"):
            for split in some[1:]:
                for predictions in predict(probes, split, mine[split.corpus], decode, trial.batch_size, pool=pool):
                    count(split.labels, predictions)

    whole, tried = ([float(split.samples.sum()) for split in these] for these in (splits, some))
    steps, scores = args.steps, -(-args.steps // args.eval_every)
    heard = [steps * args.batch_size * whole[0] / len(splits[0].ids), scores * whole[1], whole[2]]  # where none is kept
    again = sum(samples for split, samples in zip(splits, heard) if split.corpus not in kept)
    spent = {"states": seconds["states"] / sum(tried) * (sum(corpus.samples.sum() for corpus in kept) + runs * again)}
    spent[f"{steps:,} steps"] = seconds["training"] / 4 * steps * runs
    spent["scores"] = seconds["scoring"] / sum(tried[1:]) * sum(heard[1:]) * runs
    parts = ", ".join(f"{what} {report.clock(seconds)}" for what, seconds in spent.items())
    print(f"about {report.clock(sum(spent.values()))}: {parts}{f'; {runs} probes' if runs > 1 else ''}", flush=True)
    raise SystemExit(0)


def load_run(args, fingerprints):
    """The newest whole save in OUT, or None. Raises ValueError where it is another run's, or none is whole."""
    run, warning = newest_save(args.out, lambda run: run["fingerprints"] and run["progress"]["step"])
    if run is None:
        return None
    if run.get("format") == "ekd-probe-1":
        progress = run["progress"]
        progress["rates"] = [{"curve": progress.pop("curve"), "best": progress.pop("best")}]
        run |= {"format": "ekd-probe-2", "probes": [run.pop("probe")]}
    if run.get("format") == "ekd-probe-2":
        run |= {"format": FORMAT, "optimizers": _apart(run.pop("optimizer"))}
    if run.get("format") != FORMAT:
        raise ValueError(f"{args.out}: holds saves that are not a probe's; give --out another folder")
    check_settings(args.out, run["settings"], vars(args), FREE)
    before = run["fingerprints"]  # the symbols were not always among them
    changed = [name for name, value in fingerprints.items() if before.get(name, value) != value]
    if changed:
        raise ValueError(f"{args.out}: not the same any more: {', '.join(changed)}; restore it, or give another --out")
    if warning:
        processes.warn(f"{warning}, step {run['progress']['step']:,}")
    return run


def _apart(moments):
    """The state of one Adam for several probes, each a group, as an Adam for each has it."""
    apart = []
    for group in moments["param_groups"]:
        state = {place: moments["state"][old] for place, old in enumerate(group["params"]) if old in moments["state"]}
        groups = [group | {"params": list(range(len(group["params"]))), "fused": True}]
        apart.append({"state": state, "param_groups": groups})
    return apart


def save_run(args, fingerprints, probes, optimizers, progress):
    run = {"format": FORMAT, "settings": vars(args), "fingerprints": fingerprints, "progress": progress}
    run |= {"probes": [probe.state_dict() for probe in probes]}
    run["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    with processes.together():
        write_whole(os.path.join(args.out, "last.pt"), lambda file: torch.save(run, file), keep=2)


@contextlib.contextmanager
def _timed(seconds, what):
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[what] += time.monotonic() - started
