"""What runs say: a line of progress and its metrics, a result with its interval, and a table over many results.

    python report.py runs/*/pr runs/*/sid runs/*/er runs/*/asr

README's promises kept here: an interval beside every score; every file that is left out is named once and counted.
"""

import processes
from processes import RANK, WORLD_SIZE

import functools
import json
import os
import sys
import time

import numpy as np
import torch

import data
from safe_files import write_text

# ---------------------------------------------------------------- while a run goes on


def introduce(args, corpus, batches, teachers, student, where, done):
    """What the run is, from rank 0."""
    warn_left_out(corpus.left_out)
    if RANK > 0:
        return
    weights = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    print(f"audio: {len(corpus):,} utterances, {corpus.hours():.2f} hours, {batches.steps_an_epoch:,} steps an epoch")
    print(f"teachers: {', '.join(teachers)}; heads: {', '.join(student.head_names)}")
    print(f"student: {args.student_layers} layers, {weights:.2f} million weights with its heads; {where}")
    if args.demo:
        print("demo: synthetic speech, and tiny teachers that were trained on it")
    if done == args.steps:
        print(f"{args.out}: finished, {done} of {args.steps} steps; give --out another folder for another run")
    else:
        print(f"{args.out}: {f'resuming after step {done}' if done else f'{args.steps:,} steps to go'}", flush=True)


class Metrics:
    """A training run's means over the steps since the line before: printed, in OUT/metrics.jsonl, and for TensorBoard.

    args: train.py's settings. heads: their names. done: steps that are done; lines of later ones are taken again.
    left_out: {path: reason} of the audio files left out so far. Every process has one; rank 0's speaks.
    """

    def __init__(self, args, heads, done, corpus, left_out, device):
        self.args, self.heads, self.corpus, self.left_out = args, heads, corpus, left_out
        self.path, self.board, self.unreadable = os.path.join(args.out, "metrics.jsonl"), None, {}
        self.terms = torch.zeros(2, len(heads), device=device)  # L1 and cosine, summed over parts of steps
        self.parts = self.steps = self.samples = 0
        self.since = time.monotonic()
        if RANK == 0 and os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                write_text(self.path, "".join(line for line in file if _step_of(line) <= done))
        if RANK == 0 and args.tensorboard:
            self.board = torch.utils.tensorboard.SummaryWriter(args.out, purge_step=done + 1)

    def close(self):
        if self.board:
            self.board.close()

    def add(self, l1, cosine):
        """The terms of one part of a step, (heads,) each."""
        self.terms += torch.stack([l1, cosine])
        self.parts += 1

    def count(self, batch):
        """One step's batch, as data.Batches gives it."""
        self.steps += 1
        self.samples += WORLD_SIZE * batch["waveforms"].numel()
        self.unreadable.update(batch["left_out"])

    def report(self, step, lr, gradient_norm):
        """Says what has come together since the line before. Ends the program where too many files cannot be read."""
        found = functools.reduce(dict.__or__, processes.gather(self.unreadable))
        warn_left_out({path: reason for path, reason in found.items() if path not in self.left_out})
        self.left_out.update(found)
        lost = self.corpus.unreadable + len(self.left_out) - len(self.corpus.left_out)
        with processes.together():
            data.check_left_out(lost, len(self.corpus) + len(self.corpus.left_out), self.args.data)
        means = processes.mean(self.terms.cpu() / self.parts)
        l1, cosine = means.mean(dim=1).tolist()
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        line = {"step": step, "loss": l1 + self.args.cosine_weight * cosine, "l1": l1, "cosine": cosine, "lr": lr}
        line |= {"audio_per_second": self.samples / data.SAMPLE_RATE / seconds, "seconds": seconds}
        line |= {"gradient_norm": float(gradient_norm), "left_out": len(self.left_out)}
        for name, (head_l1, head_cosine) in zip(self.heads, means.t().tolist()):
            line |= {f"l1/{name}": head_l1, f"cosine/{name}": head_cosine}
        with processes.together():
            if RANK == 0:
                self._say(line, (self.args.steps - step) * seconds / self.steps)
        self.terms.zero_()
        self.parts = self.steps = self.samples = 0
        self.unreadable = {}

    def _say(self, m, seconds_left):
        steps = self.args.steps
        print(
            f"step {m['step']:>{len(str(steps))}}/{steps}  loss {m['loss']:.4f}  L1 {m['l1']:.4f}  cosine {m['cosine']:.4f}"
            f"  lr {m['lr']:.2e}  {m['audio_per_second']:.3g} s of audio/s  {clock(seconds_left)} left",
            flush=True,
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(m) + "\n")
        for name in m.keys() - {"step"} if self.board else ():
            self.board.add_scalar(name, m[name], m["step"])


def find_tensorboard():
    """Raises ValueError where it is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not there: pip install tensorboard") from None


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short when the run was killed
        return float("inf")


def stop_not_finite(args, step, saved, mine, batches):
    """Ends the run on every process, naming the files of those whose own loss is not finite, else all of the step's batch.

    mine: whether this process's own was not; batches: data.Batches or alike.
    """
    shares = processes.gather((mine, batches[step - 1]["paths"]))
    files = [path for not_finite, share in shares if not_finite for path in share]
    what = "loss" if files else "gradient"
    files = files or [path for _, share in shares for path in share]
    kept = f"{args.out} is as saved after step {saved}" if saved else "nothing was saved yet"
    processes.stop(f"step {step}: the {what} is not finite; files of the batch: {', '.join(files)}; {kept}")


def warn_left_out(left_out):
    """One line on stderr for each file that is left out, up to twenty; from rank 0 only."""
    if RANK == 0:
        for path, reason in list(left_out.items())[:20]:
            print(f"warning: left out {path}: {reason}", file=sys.stderr)
        if len(left_out) > 20:
            print(f"warning: left out {len(left_out) - 20} more files", file=sys.stderr)


def clock(seconds):
    """Seconds as 1 d 2:03:04."""
    days, seconds = divmod(round(seconds), 86400)
    return f"{f'{days} d ' if days else ''}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# ---------------------------------------------------------------- a result


def bootstrap(*sets, resamples=10_000, seed=0):
    """95% interval, [low, high], of sum(parts) / sum(totals) where the utterances are drawn anew with replacement.

    sets: (parts, totals), each (utterances,); of several, such as folds, it is the interval of the mean of their scores.
    Source: Bisani and Ney 2004, Bootstrap estimates for confidence intervals in ASR performance evaluation.
    """
    rng, scores = np.random.default_rng(seed), np.zeros(resamples)
    for parts, totals in sets:
        for resample in range(resamples):
            drawn = rng.integers(0, len(parts), len(parts))
            scores[resample] += parts[drawn].sum() / totals[drawn].sum() / len(sets)
    return [float(edge) for edge in np.percentile(scores, [2.5, 97.5])]


def describe(split, unknown=(), too_short=0):
    """One line on a split of a probe: its size, and what of it is not used. unknown: words that the lexicon lacks."""
    parts = [f"{split.name}: {len(split.ids):,} utterances, {split.samples.sum() / data.SAMPLE_RATE / 3600:.2f} hours"]
    if too_short:
        parts.append(f"{too_short} with fewer frames than their transcript needs")
    if split.left_out:
        parts.append(f"{len(split.left_out)} left out")
        parts += sorted({why for why in split.left_out.values() if not why.startswith("not in the lexicon")})[:3]
    if unknown:
        parts.append(f"not in the lexicon: {' '.join(sorted(unknown)[:20])}{' ...' if len(unknown) > 20 else ''}")
    return "; ".join(parts)


def show(args, result, dev, test, rows):
    """Prints the result as a person reads it. dev, test: names of the splits; rows: (name, value, remark) of the task."""
    metric, counts = result["metric"], result["counts"][test]
    step, best = next(pair for pair in result["curve"] if pair[0] == result["best_step"])
    of = f"{counts['utterances']:,} utterances, {counts['left_out']} left out"
    print(f"\n{result['task'].capitalize()} of {args.upstream} on {test} ({of})")
    show_rows([score_row(metric, result[metric.lower()], result["interval"]), *rows])
    show_rows([("best step", f"{step:,}", f"{metric} {best:.2%} on {dev}")])
    if "lr" in result:
        show_rows([("best --lr", f"{result['lr']:g}", f"of {', '.join(result['curves'])}")])
    show_weights(args, result)


def score_row(name, score, interval):
    return name, f"{score:.2%}", f"95% interval {interval[0]:.2%} to {interval[1]:.2%}"


def show_rows(rows):
    for name, value, remark in rows:
        print(f"  {name:13}  {value:>8}  {remark}".rstrip())


def show_weights(args, result, of=""):
    """The learned weights of the hidden states, and where the result lies."""
    print(f"  learned weights of the hidden states{of}:")
    print("\n".join(bars(result["layer_weights"], result["upstream"].get("layers"))))
    print(f"{args.out}: result.json, test.hyp, test.ref", flush=True)


def bars(weights, layers=None, width=40):
    """The learned weights of hidden states, 0.. or `layers`, as lines of text, the longest bar for the largest."""
    longest, layers = max(weights), layers or range(len(weights))
    return [f"  state {i:>2}  {w:.3f}  {'#' * round(width * w / longest)}" for i, w in zip(layers, weights)]


def write_result(args, result, **texts):
    """OUT/result.json, and OUT/test.hyp and test.ref of texts: {ID: symbols}, one utterance a line."""
    with processes.together():
        for name, lines in texts.items():
            text = "".join(" ".join([name, *map(str, symbols)]) + "\n" for name, symbols in lines.items())
            write_text(os.path.join(args.out, f"test.{name}"), text)
        write_text(os.path.join(args.out, "result.json"), json.dumps(result, indent=2))


# ---------------------------------------------------------------- a table of results

TASKS = {
    "phoneme recognition": "PR",
    "speaker identification": "SID",
    "emotion recognition": "ER",
    "speech recognition": "ASR",
}


def table(folders):
    """Lines of a table of the result.json in the folders: upstreams by tasks, laid out as in the paper.

    An upstream is known by its digest, wherever it lay. Raises FileNotFoundError and ValueError.
    """
    scores, paths = {}, {}
    for folder in folders:
        path = os.path.join(folder, "result.json")
        try:
            with open(path, encoding="utf-8") as file:
                result = json.load(file)
            metric, (low, high) = result["metric"], result["interval"]
            cell = f"{result[metric.lower()]:.2%} ({low:.2%} to {high:.2%})"
            upstream, task = result["upstream"]["digest"], (TASKS[result["task"]], metric)
            name = paths.setdefault(upstream, result["upstream"]["path"])
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path}: no such result; give folders that an evaluate_*.py wrote") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not the result of an evaluate_*.py") from None
        if task in scores.setdefault(upstream, {}):
            raise ValueError(f"{path}: a second {task[0]} of {name}; give one")
        scores[upstream][task] = cell
    order = list(TASKS.values())
    tasks = sorted({task for row in scores.values() for task in row}, key=lambda task: order.index(task[0]))
    arrows = {"accuracy": "up"}
    head = ["upstream", *(f"{task} ({metric}, {arrows.get(metric, 'down')})" for task, metric in tasks)]
    many = {upstream for upstream, path in paths.items() if list(paths.values()).count(path) > 1}
    rows = [head]
    for upstream, row in scores.items():
        name = f"{paths[upstream]} ({upstream[:6]})" if upstream in many else paths[upstream]
        rows.append([name, *(row.get(task, "-") for task in tasks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def main(arguments=None):
    parser = processes.parser("A table of results: upstreams by tasks, with 95% intervals.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders with a result.json, such as runs/*/pr")
    args = parser.parse_args(arguments)
    with processes.together():
        print("\n".join(table(args.folders)))


if __name__ == "__main__":
    processes.run(main)
