"""Results of the evaluations as one Markdown table, with 95% intervals, and as pictures (SVG).

python -m superb.report runs/*/pr runs/*/sid --to results.md --picture scores.svg
python -m superb.report runs/a/pr runs/b/pr --names runs/a=Average,runs/b=Concatenation
python -m superb.report --curves loss.svg runs/avg runs/concat runs/none
"""

import html
import io
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import checkpoint
import manifest
import program
from superb.probe import bootstrap, mean_and_interval

TASKS = {  # {task: column}
    "phoneme recognition": "PR (PER, ↓)",
    "speaker identification": "SID (accuracy, ↑)",
    "emotion recognition": "ER (accuracy, ↑)",
    "speech recognition": "ASR (WER, ↓)",
}
BLUE, LIGHT_GREY = "#1f6feb", "#d0d7de"
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(eq=False)
class Row:
    """A table row: scores {column: (value, low, high)} of an upstream, or their differences."""

    name: str
    group: str = ""
    line_number: int = 0  # in rows.tsv, from 1; 0 if absent
    results: dict = field(default_factory=dict)  # {column: {seed: content of result.json}}
    scores: dict = field(default_factory=dict)
    bold: dict = field(default_factory=dict)  # {column: whether the score is printed bold}


# ------------------------------------------------------------------ results


def find_row(folder):
    """(Row, seed) of ROW (seed 0) or ROW/seed-N; the name is from rows.tsv, or the path."""
    seed = re.fullmatch("seed-([0-9]+)", folder.name)
    folder = folder.parent if seed else folder
    row, table = Row(str(folder)), folder.absolute().parent / "rows.tsv"
    for number, line in manifest.read_lines(table) if table.exists() else []:
        columns = line.rstrip("\n").split("\t")
        if len(columns) != 3:
            raise ValueError(f"{table}, line {number}: not FOLDER<tab>GROUP<tab>NAME")
        if columns[0] == folder.absolute().name:
            row = Row(columns[2], columns[1], number)
    return row, int(seed[1]) if seed else 0


def read_rows(folders):
    """Rows, in the order of rows.tsv, of folders ROW/TASK, ROW/seed-N/TASK, ROW/TASK-noise, ...

    One warning names folders without a result. Raises ValueError if no folder has one.
    """
    rows, missing = {}, []
    for folder in map(Path, folders):
        path = folder / "result.json"
        if not path.exists():
            missing.append(str(folder))
            continue
        result = checkpoint.read_json(path)
        if result.get("task") not in TASKS or "per_utterance" not in result:
            raise ValueError(f"{path}: not a result of this version; delete it and evaluate again")
        row, seed = find_row(run_folder(folder))
        row = rows.setdefault(row.name, row)
        seeds = row.results.setdefault(column_of(result), {})
        if seed in seeds:
            raise ValueError(f"{folder}: a second result of {row.name}, seed {seed}; give one")
        seeds[seed] = result
    message = f"no result.json in {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
    if not rows:
        raise ValueError(message)
    if missing:
        warnings.warn(message)
    ordered = sorted(rows.values(), key=lambda row: row.line_number)
    groups = [row.group for row in ordered]
    return sorted(ordered, key=lambda row: (row.group != "", groups.index(row.group)))


def run_folder(folder):
    """The folder of the student or upstream that an evaluation's folder is in, or is itself."""
    has_task = re.fullmatch("(pr|sid|er|asr)(-noise.*)?", folder.name)
    return folder.parent if has_task else folder


def rename(rows, pairs):
    """Renames rows. pairs: "name=new name". Raises ValueError for unknown and equal names."""
    names = {}
    for pair in pairs:
        name, _, names[name] = pair.rpartition("=")
    for row in rows:
        row.name = names.pop(row.name, row.name)
    there = [row.name for row in rows]
    if names:
        raise ValueError(f"--names {next(iter(names))}: no such row; there are {', '.join(there)}")
    if len(set(there)) < len(there):
        raise ValueError(f"--names: two rows of one name; they would be {', '.join(there)}")


def column_of(result):
    """The name of a result's column, such as "PR (PER, ↓)" or "PR at 0 dB (PER, ↓)"."""
    column = TASKS[result["task"]]
    if not result.get("noise"):
        return column
    snr = " to ".join(f"{ratio:g}" for ratio in result["noise"]["snr"])
    return column.replace(" (", f" at {snr} dB (")


def columns_of(rows):
    """The columns in the order of TASKS; within a task clean, then from quiet to loud noise."""
    tasks = [task.split()[0] for task in TASKS.values()]

    def order(column):
        snr = re.search(r" at (\S+)", column)
        return tasks.index(column.split()[0]), -float(snr[1]) if snr else -math.inf, column

    return sorted({column for row in rows for column in row.results}, key=order)


# ------------------------------------------------------------------ scores


def score_rows(rows, against=None):
    """Sets scores and bold of rows. Returns Rows of the differences from the row `against`.

    Raises ValueError if there is no such row, or if rows have different test utterances.
    """
    base = next((row for row in rows if row.name == against), None)
    if against and not base:
        names = ", ".join(row.name for row in rows)
        raise ValueError(f"--against {against}: no such row; there are {names}")
    differences = {row.name: Row(row.name, f"difference from {against}") for row in rows}
    for column in columns_of(rows):
        resampled, test_sets = {}, set()
        rows_of_column = [row for row in rows if column in row.results]
        for row in rows_of_column:
            results = row.results[column]
            resampled[row] = {seed: bootstrap(x["per_utterance"]) for seed, x in results.items()}
            interval = mean_and_interval(list(resampled[row].values()))
            row.scores[column] = np.clip(interval, 0, 1 if "↑" in column else None)
            test_sets |= {result["test_set"] for result in results.values()}
        if len(test_sets) > 1:
            problem = "tested on different utterances or noise; report them separately"
            raise ValueError(f"{column}: {problem}")
        best = (max if "↑" in column else min)(row.scores[column][0] for row in rows_of_column)
        for row in rows_of_column:
            row.bold[column] = row.scores[column][0] == best
            shared = resampled[row].keys() & resampled.get(base, {}).keys()  # seeds
            if row is not base and shared:
                paired = [resampled[row][seed] - resampled[base][seed] for seed in sorted(shared)]
                interval = mean_and_interval(paired)
                differences[row.name].scores[column] = interval
                # One seed does not show how much training varies.
                excludes_0 = interval[1] * interval[2] > 0
                differences[row.name].bold[column] = excludes_0 and len(shared) > 1
    return [row for row in differences.values() if row.scores]


def describe_sample(rows, column):
    """Such as "2,500 utterances, 1 to 3 seeds"."""
    per_row = [row.results[column] for row in rows if column in row.results]
    result = next(iter(per_row[0].values()))
    test = list(result["counts"].values())[-1]  # train, dev, test
    counts = sorted({len(seeds) for seeds in per_row})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{test['utterances']:,} utterances, {number} seed{'' if number == '1' else 's'}"


def table(rows, differences):
    """The table in Markdown, in percent: per group the scores, then the differences."""
    columns = columns_of(rows)
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for row in rows + differences:
        heading = [f"*{row.group}*"] + [""] * len(columns)
        if row.group and heading not in lines:
            lines.append(heading)
        cells = dict.fromkeys(columns, "")
        for column, interval in row.scores.items():
            value, low, high = 100 * interval
            text = f"{value:+.1f}" if row in differences else f"{value:.1f}"
            text = f"**{text}**" if row.bold[column] else text
            cells[column] = f"{text} ({low:.1f} to {high:.1f})"
        lines.append([row.name, *cells.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ""
    for line in lines:
        entries = [entry.ljust(width) for entry, width in zip(line, widths)]
        text += f"| {' | '.join(entries)} |\n"
    samples = [f"{column.split(' (')[0]} {describe_sample(rows, column)}" for column in columns]
    samples = "; ".join(samples)
    over = "utterances and seeds" if "seeds" in samples else "utterances"
    text += f"\nIn percent, with 95% intervals over {over}. Test sets: {samples}. "
    text += "Bold: the best of a column"
    if differences:
        text += "; differences of two or more seeds whose interval excludes 0, not corrected for "
        text += "the number of comparisons. Differences are over the seeds that both rows have"
    return f"{text}.\n"


# ------------------------------------------------------------------ pictures


def new_figure(count, width, height, title, sharey=True):
    """(figure, panels) on a white background. Raises ValueError if matplotlib is missing."""
    os.environ.pop("MPLBACKEND", None)  # an SVG needs none; a missing one is an error
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9}
    settings |= {"axes.titlesize": 9, "axes.edgecolor": LIGHT_GREY, "grid.color": LIGHT_GREY}
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    matplotlib.rcParams.update(settings)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    return figure, figure.subplots(1, count, sharey=sharey, squeeze=False)[0]


def save_picture(figure, path, label):
    """Writes an SVG with an aria-label."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    root = f'<svg role="img" aria-label="{html.escape(label)}" '
    checkpoint.save(path, svg.getvalue().replace("<svg ", root, 1))


def add_legend(figure, keys, labels):
    """Below the panels. keys: per label, the properties of its line."""
    from matplotlib.lines import Line2D  # only here, since matplotlib may be missing

    lines = [Line2D([], [], **key) for key in keys]
    figure.legend(lines, labels, loc="outside lower center", ncols=6, frameon=False)


def draw_rows(rows, columns, path, title, note, width, plot):
    """A panel per column, in which plot(panel, row, column, y) draws each row."""
    labels = []
    for row in rows:
        if row.group and row.group not in labels:
            labels.append(row.group)
        labels.append(row.name)
    size = (2 + width * len(columns), 1.6 + 0.22 * len(labels))
    figure, panels = new_figure(len(columns), *size, title)
    for panel, column in zip(panels, columns):
        for row in [row for row in rows if column in row.results]:
            plot(panel, row, column, labels.index(row.name))
        sample = describe_sample(rows, column).replace(", ", "\n")
        panel.set_title(f"{column}\n{sample}")
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.spines["left"].set_visible(False)
        panel.tick_params(left=False)
    panels[0].set_yticks(range(len(labels)), labels)
    for text in panels[0].get_yticklabels():
        if text.get_text() in [row.group for row in rows]:
            text.set_fontweight("bold")
    figure.supxlabel(note, fontsize=8)
    save_picture(figure, path, f"{title}; {', '.join(columns)}; {', '.join(labels)}.")


def draw_scores(rows, path):
    """Per row and column a dot at the score, on a line over the interval."""

    def plot(panel, row, column, y):
        value, low, high = 100 * row.scores[column]
        face = BLUE if row.bold[column] else "white"
        panel.plot([low, high], [y, y], color=BLUE)
        panel.plot(value, y, "o", color=BLUE, markerfacecolor=face, markersize=5)
        panel.grid(axis="x", linewidth=0.6)

    note = "Dot: mean over seeds, in percent. Line: 95% interval. Filled dot: the best."
    draw_rows(rows, columns_of(rows), path, "Scores of frozen upstreams", note, 2, plot)


def draw_layers(rows, path):
    """Per row and task the learned weight of every hidden state; not of rows with one state.

    Columns in noise have the same weights, since noise is only in the test split.
    """

    def weights(row, column):
        results = list(row.results[column].values())
        means = np.mean([result["layer_weights"] for result in results], axis=0)
        return dict(zip(results[0]["upstream"]["layers"], means))

    def plot(panel, row, column, y):
        for state, weight in weights(row, column).items():
            panel.barh(y, 1, left=state - 0.5, height=1, color=BLUE, alpha=weight)
            panel.text(state, y, f"{100 * weight:.0f}", ha="center", va="center", fontsize=6)
        panel.set_xlim(-0.5, last + 0.5)
        panel.set_xticks(range(0, last + 1, 1 if last < 8 else 4))

    rows = [row for row in rows if any(len(weights(row, column)) > 1 for column in row.results)]
    if not rows:
        warnings.warn(f"{path}: not drawn, no row has more than one hidden state")
        return
    columns = columns_of(rows)
    columns = [column for column in columns if " dB " not in column] or columns
    last = max(max(weights(row, column)) for row in rows for column in row.results)
    note = "Mean weight of each hidden state in percent. State 0 is the input of layer 1."
    title = "Learned weights of the hidden states"
    draw_rows(rows, columns, path, title, note, max(1.8, 0.6 + 0.2 * last), plot)


def draw_curves(folders, path):
    """A panel per run of train.py: the loss of each head; colours are layers, styles teachers.

    Grey: the held-out loss of --valid, the mean over heads.
    """
    title, names, colours, styles = "Distillation loss per layer", [], {}, {}
    is_held_out = False
    figure, panels = new_figure(len(folders), 1 + 2.4 * len(folders), 3.2, title)
    for folder, panel in zip(map(Path, folders), panels):
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        lines = [json.loads(line) for line in lines if line.endswith("}")]
        if not lines:
            raise ValueError(f"{folder}/metrics.jsonl: no complete line")
        has_seed = folder.name.startswith("seed-")
        home = folder.parent.parent if has_seed else folder.parent
        seed = folder.name.replace("seed-", ", seed ") if has_seed else ""
        names.append(find_row(folder)[0].name + seed)
        for head in [key.removeprefix("l1/") for key in lines[0] if key.startswith("l1/")]:
            teacher, _, layer = head.rpartition(".")
            listed, _ = find_row(home / f"teacher-{teacher}")
            teacher = listed.name.removeprefix("teacher: ") if listed.line_number else teacher
            colour = colours.setdefault(layer, f"C{len(colours)}")
            next_style = LINE_STYLES[len(styles) % len(LINE_STYLES)]
            style = styles.setdefault(teacher, next_style) if teacher else "-"
            losses = [line[f"l1/{head}"] + line[f"cosine/{head}"] for line in lines]
            panel.plot([line["step"] for line in lines], losses, color=colour, linestyle=style)
        valid = [line for line in lines if "valid" in line]
        if valid:
            losses = [line["valid_l1"] + line["valid_cosine"] for line in valid]
            panel.plot([line["step"] for line in valid], losses, color="grey", marker=".")
            is_held_out = True
        panel.set_title(names[-1])
        panel.set_xlabel("step")
        panel.grid(linewidth=0.6)
    panels[0].set_ylabel("loss of a head (L1 + cosine)")
    keys = [{"color": colour} for colour in colours.values()]
    keys += [{"color": "black", "linestyle": style} for style in styles.values()]
    labels = [layer.replace("layer", "layer ") for layer in colours] + list(styles)
    if is_held_out:
        keys.append({"color": "grey", "marker": "."})
        labels.append("held out, mean")
    add_legend(figure, keys, labels)
    save_picture(figure, path, f"{title}: {', '.join(names)}.")


def draw_steps(folders, path):
    """A panel per column: scores over the steps of distillation, a line per name in rows.tsv.

    Rows that have no steps, such as filter banks, and unfinished evaluations are left out.
    """
    by_steps = {}  # {steps: folders of evaluations}
    for folder in map(Path, folders):
        config = checkpoint.read_json(run_folder(folder) / "config.json")
        steps = config.get("settings", {}).get("steps")
        if steps and (folder / "result.json").exists():
            by_steps.setdefault(steps, []).append(folder)
    if not by_steps:
        raise ValueError(f"--steps: no folder has a result of a student, such as {folders[0]}")
    points, all_rows = {}, []  # {(row's name, column): [(steps, score, low, high), ...]}
    for steps in sorted(by_steps):
        rows = read_rows(by_steps[steps])
        score_rows(rows)
        all_rows += rows
        for row in rows:
            for column, interval in row.scores.items():
                point = (steps, *(100 * interval))
                points.setdefault((row.name, column), []).append(point)
    columns, names = columns_of(all_rows), list(dict.fromkeys(row.name for row in all_rows))
    title = "Scores over the steps of distillation"
    figure, panels = new_figure(len(columns), 1 + 2.6 * len(columns), 3.2, title, sharey=False)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for (name, column), line in points.items():
        panel = panels[columns.index(column)]
        steps, score, low, high = np.transpose(line)
        errors = (score - low, high - score)
        panel.errorbar(steps, score, errors, color=colours[name], marker="o", markersize=4)
    for panel, column in zip(panels, columns):
        panel.set_title(column)
        panel.set_xlabel("steps")
        panel.set_xscale("log")
        panel.set_xticks(sorted(by_steps), [f"{steps:,}" for steps in sorted(by_steps)])
        panel.minorticks_off()
        panel.grid(linewidth=0.6)
    panels[0].set_ylabel("percent, with 95% intervals")
    add_legend(figure, [{"color": colour} for colour in colours.values()], names)
    save_picture(figure, path, f"{title}: {', '.join(names)}.")


def main(arguments=None):
    parser = program.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="of an evaluation: ROW/TASK, ROW/seed-N/TASK")
    add("--against", metavar="ROW", help="also show the paired differences from this row")
    add("--names", type=program.names, default=[], help="names of rows: runs/a=Average,runs/b=...")
    add("--to", metavar="FILE.md", help="write the table to this file too")
    add("--picture", metavar="FILE.svg", help="draw the scores")
    add("--layers", metavar="FILE.svg", help="draw the learned weights of the hidden states")
    add("--steps", nargs="+", metavar=("FILE.svg", "FOLDER"), help="draw scores over steps")
    add("--curves", nargs="+", metavar=("FILE.svg", "RUN"), help="draw losses of train.py's runs")
    program.init()
    with program.one_line_errors():
        args = parser.parse_args(arguments)
        if any(drawn and len(drawn) == 1 for drawn in (args.steps, args.curves)):
            raise ValueError("give --steps FILE.svg FOLDER, or --curves FILE.svg RUN")
        of_table = [args.against, args.names, args.to, args.picture, args.layers]
        if not args.folders and (any(of_table) or not (args.steps or args.curves)):
            raise ValueError("no folders of evaluations")
        if args.folders:
            rows = read_rows(args.folders)
            rename(rows, args.names)
            text = table(rows, score_rows(rows, args.against))
            print(text, end="", flush=True)
            if args.to:
                checkpoint.save(args.to, text)
            if args.picture:
                draw_scores(rows, args.picture)
            if args.layers:
                draw_layers(rows, args.layers)
        if args.steps:
            draw_steps(args.steps[1:], args.steps[0])
        if args.curves:
            draw_curves(args.curves[1:], args.curves[0])


if __name__ == "__main__":
    program.run(main)
