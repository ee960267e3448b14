"""Emotion recognition of SUPERB (arXiv:2105.01051): a frozen upstream, mean pooling, accuracy.

    python -m superb.er --upstream runs/avg/student.pt --data data/IEMOCAP
    python -m superb.er --upstream runs/avg/student.pt --manifest emotions.csv

The score is the mean over five folds: each session of IEMOCAP is the test set of a probe trained
on the other four. Excited counts as happy. The same command resumes a run.
"""

import argparse
import glob
import os
import re

import numpy as np

import manifest
import program
from cache import key
from superb import probe
from superb.sid import Classification, make_split, read_corpus, read_table
from superb.upstream import Upstream

EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}


def make_parser():
    parser = probe.make_parser(__doc__, "er", data="data/IEMOCAP", steps=30_000)
    parser.add_argument("--manifest", help="a .csv of path,label,fold; paths as in superb.sid")
    return parser


def read_iemocap(folder):
    """[(path, emotion, session, place of the line)] of IEMOCAP's four classes."""
    rows = []
    for session in "12345":
        tables = os.path.join(folder, f"Session{session}", "dialog", "EmoEvaluation")
        if not os.path.isdir(tables):
            raise FileNotFoundError(f"{tables}: no such folder; give --data IEMOCAP's folder")
        for table in sorted(glob.glob(f"{glob.escape(tables)}/*.txt")):  # no dot files
            for number, line in manifest.read_lines(table):
                # [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
                turn = re.match(r"\[[\d. -]+\]\t(\w+)\t(\w+)\t", line)
                if turn and turn[2] in EMOTIONS:
                    dialog = turn[1].rpartition("_")[0]
                    path = f"Session{session}/sentences/wav/{dialog}/{turn[1]}.wav"
                    rows.append((path, EMOTIONS[turn[2]], session, f"{table}, line {number}"))
    if not rows:
        raise ValueError(f"{folder}: no utterance of {', '.join(EMOTIONS)}")
    return rows


def read_folds(root, rows, seed):
    """(classes, {fold: [train, dev, test]}) of rows (path, emotion, fold, place of the line).

    Per fold, the other folds are split at random, by the seed, into 80% train and 20% dev.
    """
    classes = sorted({row[1] for row in rows})
    corpus = read_corpus(root, rows)
    readable = [row for row in rows if row[0] not in corpus.skipped]
    names = sorted({row[2] for row in rows})
    if len(names) < 2:
        raise ValueError(f"{rows[0][3]}: only one fold, {names}; one has to be held out")
    folds = {}
    for fold in names:
        others = [row for row in readable if row[2] != fold]
        drawn = [others[i] for i in np.random.default_rng(seed).permutation(len(others))]
        size = int(0.8 * len(drawn))
        parts = {"train": drawn[:size], "dev": drawn[size:]}
        parts["test"] = [row for row in rows if row[2] == fold]
        folds[fold] = [make_split(name, corpus, parts[name], classes) for name in parts]
    return classes, folds


def evaluate(args):
    """The result of args.upstream, a dict: the mean over the results in OUT/fold-NAME."""
    with program.one_line_errors():
        if args.manifest:
            rows = read_table(args.manifest, ["path", "label", "fold"])
            classes, folds = read_folds(os.path.dirname(args.manifest), rows, args.seed)
        else:
            classes, folds = read_folds(args.data, read_iemocap(args.data), args.seed)
        upstream = Upstream(args)
    task = Classification("emotion recognition", classes)
    results = []
    for fold, splits in folds.items():
        print(f"\nfold {fold}")
        out = os.path.join(args.out, f"fold-{fold}")
        fold_args = argparse.Namespace(**vars(args) | {"out": out})
        results.append(probe.evaluate(fold_args, task, upstream, *splits))

    accuracies = [result["accuracy"] for result in results]
    weights = [result["layer_weights"] for result in results]
    result = {name: results[0][name] for name in ("task", "metric", "upstream", "noise", "torch")}
    result["per_utterance"] = [counts for fold in results for counts in fold["per_utterance"]]
    result["test_set"] = key([fold["test_set"] for fold in results])
    result["deviation"] = float(np.std(accuracies, ddof=1))
    result["folds"] = dict(zip(folds, accuracies))
    result["layer_weights"] = np.mean(weights, axis=0).tolist()
    result["seconds"] = sum(fold["seconds"] for fold in results)
    utterances = sum(len(errors) for errors, _ in result["per_utterance"])
    result["counts"] = {"test": {"utterances": utterances}}
    result["settings"] = vars(args) | {"precision": upstream.precision}
    print(f"\nmean over {len(folds)} folds, deviation {result['deviation']:.2%}")
    probe.write_result(args, result)
    return result


def main(arguments=None):
    probe.main(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    program.run(main)
