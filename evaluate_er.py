"""Emotion recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, mean pooling, accuracy
over five folds, a session held out each time.

    python evaluate_er.py --upstream runs/avg/student.pt --data data/IEMOCAP
    python evaluate_er.py --upstream runs/avg/student.pt --manifest emotions.csv
    python evaluate_er.py --demo

Running the same command again resumes the run.
"""

import processes

import argparse
import os
import re

import numpy as np
import torch

import data
import demo
import probe
import report
from evaluate_sid import MeanHead, class_loss, class_of, labelled_corpus, mean_over_frames, read_table, right
from states import States

# IEMOCAP's four classes; excited counts as happy.
EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n\n")[0].replace("\n", " "))
    parser.set_defaults(data="data/IEMOCAP", steps=30_000, lr=1e-4)
    parser.add_argument("--manifest", help="a .csv of path,label,fold instead of IEMOCAP; paths from its folder")
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=demo.STUDENT, manifest=demo.EMOTIONS)
        parser.set_defaults(steps=600, batch_size=16, lr=1e-2, log_every=300, eval_every=100)
    return probe.finish(parser.parse_args(arguments), "er")


# ---------------------------------------------------------------- tables of files


def read_iemocap(folder):
    """(root, [(path, emotion, fold, line)]) of IEMOCAP's four classes; a fold is a session.

    Raises FileNotFoundError and ValueError.
    """
    rows = []
    for session in range(1, 6):
        labels = os.path.join(folder, f"Session{session}", "dialog", "EmoEvaluation")
        if not os.path.isdir(labels):
            raise FileNotFoundError(
                f"{labels}: no such folder; give --data the folder of IEMOCAP's Session1 to Session5"
            )
        for name in sorted(os.listdir(labels)):
            if not name.endswith(".txt") or name.startswith("."):
                continue
            path = os.path.join(labels, name)
            for number, line in data.read_lines(path):
                # [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
                turn = re.match(r"\[[\d. -]+\]\t(\w+)\t(\w+)\t", line)
                if turn and turn[2] in EMOTIONS:
                    dialogue = turn[1].rpartition("_")[0]
                    audio = f"Session{session}/sentences/wav/{dialogue}/{turn[1]}.wav"
                    rows.append((audio, EMOTIONS[turn[2]], str(session), f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{folder}: no utterance of neu, hap, exc, sad or ang in Session*/dialog/EmoEvaluation")
    return folder, rows


def read_manifest(path):
    """(root, [(path, label, fold, line)]) of a .csv of path,label,fold. Raises FileNotFoundError and ValueError."""
    rows = read_table(path, ["path", "label", "fold"])
    return os.path.dirname(path), [
        (row["path"], row["label"], row["fold"], f"{path}, line {row['line']}") for row in rows
    ]


def read_folds(root, rows, seed):
    """(classes, {fold: the three probe.Splits}) of rows (path, label, fold, line).

    A fold is tested on by a probe trained on 80% of the others' utterances and chosen on the other 20%, drawn by the seed.
    """
    classes = sorted({label for _, label, _, _ in rows})
    corpus, places = labelled_corpus(root, [row[0] for row in rows], [row[3] for row in rows])
    rows = [row for row in rows if row[0] in places]
    folds = sorted({fold for _, _, fold, _ in rows})
    if len(folds) < 2:
        raise ValueError(f"one fold only, {folds[0]}; two or more are needed, to hold one out")

    def split(name, mine):
        labels = [torch.tensor(classes.index(row[1])) for row in mine]
        left_out = corpus.left_out if name == "test" else {}
        return probe.Split(name, corpus, [places[row[0]] for row in mine], [row[0] for row in mine], labels, left_out)

    found = {}
    for fold in folds:
        others = [row for row in rows if row[2] != fold]
        drawn = np.random.default_rng(seed).permutation(len(others))
        train = int(0.8 * len(others))
        parts = {"train": [others[i] for i in sorted(drawn[:train])], "dev": [others[i] for i in sorted(drawn[train:])]}
        parts["test"] = [row for row in rows if row[2] == fold]
        found[fold] = [split(name, mine) for name, mine in parts.items()]
    return classes, found


# ---------------------------------------------------------------- the run


def main(arguments=None):
    processes.begin()
    args = parse(arguments)
    device = processes.device()
    if args.demo:
        with processes.together():
            demo.student()
            demo.emotions()
    with processes.together():
        rows = read_manifest(args.manifest) if args.manifest else read_iemocap(args.data)
        classes, folds = read_folds(*rows, args.seed)
        upstream = probe.Upstream(args.upstream, device, args.precision, args.states)
    corpus = next(iter(folds.values()))[0].corpus
    states = {corpus: States(upstream, corpus)}
    print(f"{len(corpus):,} utterances, {len(classes)} classes, {len(folds)} folds; {len(corpus.left_out)} left out")
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    results, scored, references, hypotheses = {}, [], {}, {}
    for fold, splits in folds.items():
        print(f"\nfold {fold}: {'; '.join(report.describe(split) for split in splits)}", flush=True)
        here = argparse.Namespace(**vars(args) | {"out": os.path.join(args.out, f"fold-{fold}")})
        result, predictions = probe.evaluate(
            here,
            upstream,
            splits,
            symbols=classes,
            metric="accuracy",
            pool=lambda states, frames, training: mean_over_frames(states, frames),
            make_head=lambda dim: MeanHead(dim, len(classes)),
            loss=class_loss,
            decode=class_of,
            count=right,
            states=states,
            higher_is_better=True,
            runs=len(folds),
        )
        if predictions is None:
            predictions = [classes.index(label) for label in result["hypotheses"]]
        else:
            result = {"task": f"emotion recognition, fold {fold}", **result}
            result["hypotheses"] = [classes[prediction] for prediction in predictions]
            report.write_result(here, result)
        results[fold] = result
        scored.append(right(splits[2].labels, predictions))
        references |= {name: [classes[int(label)]] for name, label in zip(splits[2].ids, splits[2].labels)}
        hypotheses |= {name: [classes[prediction]] for name, prediction in zip(splits[2].ids, predictions)}

    accuracies = {fold: result["accuracy"] for fold, result in results.items()}
    confusion = {label: {other: 0 for other in classes} for label in classes}
    for name, (label,) in references.items():
        confusion[label][hypotheses[name][0]] += 1
    first = next(iter(results.values()))
    result = {
        "task": "emotion recognition",
        "metric": "accuracy",
        "accuracy": float(np.mean(list(accuracies.values()))),
        "interval": report.bootstrap(*scored),
        "deviation": float(np.std(list(accuracies.values()), ddof=1)),
        "folds": accuracies,
        "held_out": {fold: splits[2].ids for fold, splits in folds.items()},
        "confusion": confusion,
        "layer_weights": np.mean([result["layer_weights"] for result in results.values()], axis=0).tolist(),
        "counts": {"test": {"utterances": len(references), "left_out": len(corpus.left_out)}},
        "seconds": {what: round(sum(r["seconds"][what] for r in results.values()), 2) for what in first["seconds"]},
        "upstream": first["upstream"],
        "settings": vars(args),
        "versions": first["versions"],
    }
    report.write_result(args, result, ref=references, hyp=hypotheses)
    show(args, result)


def show(args, result):
    """The result as a person reads it."""
    print(f"\nEmotion recognition of {args.upstream}, the mean over {len(result['folds'])} folds")
    rows = [report.score_row("accuracy", result["accuracy"], result["interval"])]
    rows += [("deviation", f"{result['deviation']:.2%}", "of the folds")]
    report.show_rows(rows + [(f"fold {fold}", f"{accuracy:.2%}", "") for fold, accuracy in result["folds"].items()])
    width = max(map(len, result["confusion"])) + 2
    print(f"  {'said, heard as':{width}}{''.join(name.rjust(width) for name in result['confusion'])}")
    for label, row in result["confusion"].items():
        print(f"  {label:{max(width, 14)}}{''.join(str(count).rjust(width) for count in row.values())}")
    report.show_weights(args, result, ", the mean over folds")


if __name__ == "__main__":
    processes.run(main)
