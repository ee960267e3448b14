"""What runs say: a line of progress and its metrics, a result with its interval, and a table over many results.

    python report.py runs/*/pr runs/*/sid runs/*/er runs/*/asr --to results.md --picture results.svg
    python report.py runs/avg runs/concat --curves loss.svg

README's promises kept here: an interval beside every score; every file that is left out is named once and counted.
"""

import processes
from processes import RANK, WORLD_SIZE

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import re
import sys
import time

import numpy as np
import torch
import torchaudio

import data
from safe_files import write_text, write_whole

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
        self.ill = torch.zeros(2, device=device)  # the first step that was not finite; whether its loss here was not
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

    def not_finite(self, step, loss, norm):
        """1.0 from the first step on whose loss or gradient norm was not finite on some process, else 0.0: for an
        optimizer's found_inf. On the device, which nobody waits for."""
        anywhere = processes.anywhere(~(torch.isfinite(loss) & torch.isfinite(norm)))
        this = torch.stack([torch.full_like(loss, step), (~torch.isfinite(loss)).float()])
        self.ill = torch.where(anywhere & (self.ill[0] == 0), this, self.ill)
        return (self.ill[0] > 0).float()

    def stop_where_not_finite(self, saved, batches):
        """Ends the run where there was such a step, naming the files of the processes whose own loss was not finite, else
        all of its batch. saved: the step last saved; batches: data.Batches or alike."""
        step, mine = (int(number) for number in self.ill.tolist())
        if not step:
            return
        shares = processes.gather((mine, batches[step - 1]["paths"]))
        files = [path for not_finite, share in shares if not_finite for path in share]
        what = "loss" if files else "gradient"
        files = files or [path for _, share in shares for path in share]
        kept = f"{self.args.out} is as saved after step {saved}" if saved else "nothing was saved yet"
        processes.stop(f"step {step}: the {what} is not finite; files of the batch: {', '.join(files)}; {kept}")

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


def read_rows(folders):
    """{row: {(task, metric): {seed: a run}}} of the results in the folders, rows in the order in which they come.

    ROW/seed-N/TASK is one seed of a row; of other folders a row is the upstream, known by its digest wherever it lay.
    A run is a dict: "result", what result.json says; "folder". Raises FileNotFoundError and ValueError.
    """
    rows, names = {}, {}
    for folder in folders:
        path = os.path.join(folder, "result.json")
        try:
            with open(path, encoding="utf-8") as file:
                result = json.load(file)
            task = TASKS[result["task"]], result["metric"]
            low, high = result["interval"]
            _ = result[task[1].lower()] + low + high
            digest, upstream = result["upstream"]["digest"], result["upstream"]["path"]
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path}: no such result; give folders that an evaluate_*.py wrote") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not the result of an evaluate_*.py") from None
        above, seed = os.path.split(os.path.dirname(os.path.normpath(folder)))
        if re.fullmatch("seed-[0-9]+", seed):
            row = os.path.basename(above)
        else:
            row, seed = digest, ""
            names.setdefault(digest, upstream)
        runs = rows.setdefault(row, {}).setdefault(task, {})
        if seed in runs:
            raise ValueError(f"{path}: a second {task[0]} of {names.get(row, f'{row}/{seed}')}; give one")
        runs[seed] = {"result": result, "folder": folder}
    many = {name for name in names.values() if list(names.values()).count(name) > 1}
    called = {row: f"{names[row]} ({row[:6]})" if names.get(row) in many else names.get(row, row) for row in rows}
    return {called[row]: tasks for row, tasks in rows.items()}


def errors(folder, result):
    """[(parts, totals), ...] of a result, one pair for each fold, from its test.ref and test.hyp: (utterances,) each.

    The score is the mean over folds of sum(parts) / sum(totals).
    """
    lines = {}
    for name in ("ref", "hyp"):
        with open(os.path.join(folder, f"test.{name}"), encoding="utf-8") as file:
            lines[name] = file.read().splitlines()
    if result["metric"] == "accuracy":  # a name may have spaces; it is the same in both
        parts = np.array([a == b for a, b in zip(lines["ref"], lines["hyp"], strict=True)], float)
        totals = np.ones(len(parts))
    else:
        said = {name: [line.split()[1:] for line in text] for name, text in lines.items()}
        distance = torchaudio.functional.edit_distance
        parts = np.array([distance(a, b) for a, b in zip(said["ref"], said["hyp"], strict=True)], float)
        totals = np.array([len(reference) for reference in said["ref"]], float)
    ends = np.cumsum([len(names) for names in result.get("held_out", {"": lines["ref"]}).values()])[:-1]
    return list(zip(np.split(parts, ends), np.split(totals, ends)))


def summarise(rows, against=None, resamples=4000):
    """{row: {(task, metric): summary}}: mean over seeds, and intervals over utterances and seeds.

    A summary has "score", "interval" and "seeds"; with `against`, the row that the others are compared with, also
    "difference" and "difference_interval", paired: the same utterances and seeds are drawn for both. Both kinds of 95%
    interval are bootstraps: utterances and, where there are several, seeds are drawn anew with replacement.
    Raises ValueError where there is no such row, or two rows of a task have other test sets.
    """
    if against is not None and against not in rows:
        raise ValueError(f"--against {against}: no such row; there are {', '.join(rows)}")
    summaries = {row: {} for row in rows}
    for task in tasks_of(rows):
        rng, weights, drawn, size = np.random.default_rng(0), None, {}, None
        of_seeds = {}  # how often each of n seeds is drawn, by n
        for row, runs in ((row, tasks[task]) for row, tasks in rows.items() if task in tasks):
            results = [run["result"] for run in runs.values()]
            mine = {"score": float(np.mean([r[task[1].lower()] for r in results])), "seeds": len(results)}
            mine["interval"] = results[0]["interval"]
            summaries[row][task] = mine
            if len(runs) == 1 and against is None:
                continue
            folds = [errors(run["folder"], run["result"]) for run in runs.values()]  # [seed][fold]
            if size is None:
                size = [totals.tolist() for _, totals in folds[0]]
                weights = [
                    rng.multinomial(len(t), np.ones(len(t)) / len(t), resamples).astype(np.float32) for t in size
                ]
            if any([totals.tolist() for _, totals in seed] != size for seed in folds):
                raise ValueError(f"{row}: its {task[0]} was tested on other utterances than the rows above")
            count = len(folds)
            of_seeds.setdefault(count, rng.multinomial(count, np.ones(count) / count, resamples) / count)
            by_seed = [np.mean([(w @ p) / (w @ t) for w, (p, t) in zip(weights, seed)], axis=0) for seed in folds]
            drawn[row] = (of_seeds[count] * np.array(by_seed).T).sum(axis=1)
            if count > 1:
                mine["interval"] = np.percentile(drawn[row], [2.5, 97.5]).tolist()
        for row in drawn if against in drawn else ():
            if row != against:
                mine, other = summaries[row][task], summaries[against][task]
                mine["difference"] = mine["score"] - other["score"]
                edges = np.percentile(drawn[row] - drawn[against], [2.5, 97.5])
                mine["difference_interval"] = edges.tolist()
    return summaries


def tasks_of(rows):
    """The (task, metric) that some row has, in the paper's order."""
    order = list(TASKS.values())
    return sorted({task for tasks in rows.values() for task in tasks}, key=lambda task: order.index(task[0]))


def heading(task):
    return f"{task[0]} ({task[1]}, {'up' if task[1] == 'accuracy' else 'down'})"


def best_score(summaries, task):
    return (max if task[1] == "accuracy" else min)(mine[task]["score"] for mine in summaries.values() if task in mine)


def costs(tasks):
    """(weights of the upstream in millions, seconds of its distillation, seconds of judging it), means over seeds, "-"
    where the runs do not say."""
    runs = [run for seeds in tasks.values() for run in seeds.values()]
    weights = {run["result"]["upstream"].get("parameters") for run in runs}
    judged = sum(
        np.mean([sum(run["result"].get("seconds", {}).values()) for run in s.values()]) for s in tasks.values()
    )
    distilled = []
    for seed in {os.path.dirname(os.path.normpath(run["folder"])) for run in runs}:
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(os.path.join(seed, "metrics.jsonl"), encoding="utf-8") as file:
                distilled.append(sum(json.loads(line)["seconds"] for line in file))
    million = f"{weights.pop() / 1e6:.2f}" if len(weights) == 1 and None not in weights else "-"
    return million, f"{np.mean(distilled):.0f}" if distilled else "-", f"{judged:.0f}"


def table(rows, summaries):
    """Lines of a table: rows by tasks, with their intervals, laid out as in the paper."""
    tasks = tasks_of(rows)
    cells = [["upstream", *map(heading, tasks), "million weights", "s to distil", "s to judge"]]
    for row, mine in summaries.items():
        found = []
        for task in tasks:
            if task in mine:
                (low, high), seeds = mine[task]["interval"], mine[task]["seeds"]
                several = f", {seeds} seeds" if seeds > 1 else ""
                found.append(f"{mine[task]['score']:.2%} ({low:.2%} to {high:.2%}{several})")
            else:
                found.append("-")
        cells.append([row, *found, *costs(rows[row])])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown(rows, summaries, against=None):
    """The table in Markdown, in percent, the best of each task bold; then the differences from the row `against`, those
    whose interval leaves zero out bold."""
    tasks = tasks_of(rows)
    best = {task: best_score(summaries, task) for task in tasks}
    head = ["", *map(heading, tasks), "million weights", "s to distil", "s to judge"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def cell(score, interval, bold):
        text = f"{100 * score:.1f}"
        return f"{f'**{text}**' if bold else text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"

    for row, mine in summaries.items():
        found = [
            cell(mine[t]["score"], mine[t]["interval"], mine[t]["score"] == best[t]) if t in mine else "-"
            for t in tasks
        ]
        lines.append(f"| {' | '.join([row, *found, *costs(rows[row])])} |")
    seeds = sorted({one["seeds"] for mine in summaries.values() for one in mine.values()})
    over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' * (seeds[0] > 1)}"
    lines += ["", f"Percent, means over {over}, with 95% intervals over utterances and seeds."]
    if against:
        lines += ["", f"| less {against} | {' | '.join(map(heading, tasks))} |", "|---" * (len(tasks) + 1) + "|"]
        for row, mine in summaries.items():
            found = []
            for task in tasks if row != against else ():
                if "difference" not in mine.get(task, {}):
                    found.append("-")
                    continue
                low, high = mine[task]["difference_interval"]
                found.append(cell(mine[task]["difference"], (low, high), low > 0 or high < 0))
            if found:
                lines.append(f"| {row} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def comma_separated(rows, summaries):
    """One line a row and task, for other programs; scores and differences are fractions."""
    head = ["row", "task", "metric", "seeds", "score", "low", "high", "difference", "difference_low", "difference_high"]
    lines = [[*head, "million_weights", "seconds_to_distil", "seconds_to_judge"]]
    for row, mine in summaries.items():
        for task in tasks_of(rows):
            if task in mine:
                one = mine[task]
                difference = [one.get("difference", ""), *one.get("difference_interval", ["", ""])]
                lines.append([row, *task, one["seeds"], one["score"], *one["interval"], *difference, *costs(rows[row])])
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


# ---------------------------------------------------------------- pictures

INK, PAPER, FAINT = "#1f2328", "#ffffff", "#d0d7de"  # and what they become on a dark page
DARK = {INK: "#e6edf3", PAPER: "#161b22", FAINT: "#3d444d"}


def find_matplotlib(flag):
    """matplotlib, drawing without a screen. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"{flag} needs a package that is not there: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "ekd", "font.family": "sans-serif", "font.size": 9}
    )
    for name in ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[name] = INK
    matplotlib.rcParams.update({"axes.edgecolor": FAINT, "figure.facecolor": PAPER, "axes.facecolor": PAPER})
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_picture(figure, path):
    """A figure, in the form that the path's ending says; an .svg turns dark on a dark page."""
    form = os.path.splitext(path)[1][1:] or "svg"
    drawn = io.BytesIO()
    figure.savefig(drawn, format=form, bbox_inches="tight", metadata={"Date": None} if form == "svg" else None)
    content = drawn.getvalue()
    if form == "svg":
        rules = "".join(
            f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}'
            for light, dark in DARK.items()
            for kind in ("fill", "stroke")
        )
        content = content.replace(
            b"<defs>", f"<style>@media (prefers-color-scheme: dark) {{ {rules} }}</style><defs>".encode(), 1
        )
    write_whole(path, lambda file: file.write(content))


def draw_scores(rows, summaries, path):
    """A panel a task, a line a row: its score as a dot on its 95% interval, the best one filled."""
    plt, tasks = find_matplotlib("--picture"), tasks_of(rows)
    names = list(summaries)
    figure, panels = plt.subplots(
        1, len(tasks), sharey=True, squeeze=False, figsize=(1.6 + 2.1 * len(tasks), 0.9 + 0.24 * len(names))
    )
    for task, panel in zip(tasks, panels[0]):
        best = best_score(summaries, task)
        for place, row in enumerate(names):
            if task in summaries[row]:
                mine = summaries[row][task]
                panel.plot([100 * edge for edge in mine["interval"]], [place] * 2, color="#6b8fc4", linewidth=2)
                face = "#1f6feb" if mine["score"] == best else PAPER
                panel.plot(100 * mine["score"], place, "o", color="#1f6feb", markerfacecolor=face, markersize=5)
        panel.set_title(f"{heading(task)[:-1]}, %)".replace(", down", " ↓").replace(", up", " ↑"), fontsize=9)
        panel.grid(axis="x", color=FAINT, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.tight_layout(w_pad=1.5)
    write_picture(figure, path)
    plt.close(figure)


def draw_layers(rows, path):
    """A panel a task: the learned weight of every hidden state, rows by states, means over seeds; each row's sum is 1."""
    plt, tasks = find_matplotlib("--layers"), tasks_of(rows)
    names, found, last = list(rows), {}, 0
    for row, task in ((row, task) for row in names for task in tasks if task in rows[row]):
        results = [run["result"] for run in rows[row][task].values()]
        weights = np.mean([result["layer_weights"] for result in results], axis=0)
        layers = results[0]["upstream"].get("layers", range(len(weights)))
        found[row, task], last = dict(zip(layers, weights)), max(last, *layers)
    size = (1.8 + len(tasks) * (0.5 + 0.16 * (last + 1)), 1.0 + 0.24 * len(names))
    figure, panels = plt.subplots(1, len(tasks), sharey=True, squeeze=False, figsize=size)
    for task, panel in zip(tasks, panels[0]):
        grid = np.full((len(names), last + 1), np.nan)
        for place, row in enumerate(names):
            for layer, weight in found.get((row, task), {}).items():
                grid[place, layer] = weight
        shown = panel.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        panel.set_title(task[0], fontsize=9)
        panel.set_xlabel("hidden state")
        panel.set_xticks(range(0, last + 1, 1 if last < 8 else 4))
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    panels[0][0].set_yticks(range(len(names)), names)
    figure.tight_layout(w_pad=1.0)
    bar = figure.colorbar(shown, ax=panels, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    write_picture(figure, path)
    plt.close(figure)


def draw_curves(runs, path):
    """A panel a run of train.py: the loss of each head, L1 plus cosine, over steps. Raises FileNotFoundError, ValueError."""
    plt, curves = find_matplotlib("--curves"), {}
    for run in runs:
        where = os.path.join(run, "metrics.jsonl")
        if not os.path.exists(where):
            raise FileNotFoundError(f"{where}: no such file; --curves takes folders of train.py's runs")
        with open(where, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if np.isfinite(_step_of(line))]
        if not lines:
            raise ValueError(f"{where}: no line of metrics yet")
        heads = [name.removeprefix("l1/") for name in lines[0] if name.startswith("l1/")]
        curves[run] = {h: [(m["step"], m[f"l1/{h}"] + m[f"cosine/{h}"]) for m in lines] for h in heads}
    figure, panels = plt.subplots(1, len(runs), sharey=True, squeeze=False, figsize=(1 + 2.6 * len(runs), 2.8))
    for (run, heads), panel in zip(curves.items(), panels[0]):
        for number, (head, points) in enumerate(heads.items()):
            style = ("-", "--", ":", "-.")[number % 4]
            panel.plot(
                *zip(*points), style, label=head, linewidth=1.3, color=plt.cm.viridis(0.1 + 0.7 * number / len(heads))
            )
        panel.set_title(os.path.relpath(run), fontsize=9)
        panel.set_xlabel("step")
        panel.grid(color=FAINT, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("loss of a head")
    figure.tight_layout()
    for panel in panels[0]:  # below, outside the layout: as many heads as there may be
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    write_picture(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------- the program


def _picture(text):
    if os.path.splitext(text)[1] not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .svg, .png or .pdf")
    return text


def _tables(text):
    paths = processes.names(text)
    for path in paths:
        if os.path.splitext(path)[1] not in (".md", ".csv"):
            raise argparse.ArgumentTypeError(f"{path}: must end in .md or .csv")
    return paths


def main(arguments=None):
    parser = processes.parser("A table of results: upstreams by tasks, with 95% intervals; and pictures.")
    add = parser.add_argument
    # fmt: off
    add("folders", nargs="+", metavar="FOLDER", help="folders with a result.json, such as runs/*/pr; ROW/seed-N/TASK are seeds of one row. For --curves, runs of train.py")
    add("--against", metavar="ROW", help="a row that the others are compared with, utterance by utterance")
    add("--to", type=_tables, default=[], metavar="FILE", help="write the table there too: a .md, a .csv, or both with a comma")
    add("--picture", type=_picture, metavar="FILE", help="draw every row's score and interval in each task (.svg, .png, .pdf; needs matplotlib)")
    add("--layers", type=_picture, metavar="FILE", help="draw the learned weight of every hidden state, rows by tasks")
    add("--curves", type=_picture, metavar="FILE", help="draw the loss of each head over steps, of runs of train.py")
    # fmt: on
    args = parser.parse_args(arguments)
    with processes.together():
        if args.curves:
            draw_curves(args.folders, args.curves)
            return
        rows = read_rows(args.folders)
        summaries = summarise(rows, args.against)
        print("\n".join(table(rows, summaries)))
        for path in args.to:
            text = markdown(rows, summaries, args.against) if path.endswith(".md") else comma_separated(rows, summaries)
            write_text(path, text)
        if args.picture:
            draw_scores(rows, summaries, args.picture)
        if args.layers:
            draw_layers(rows, args.layers)


if __name__ == "__main__":
    processes.run(main)
