"""Emotion recognition, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, mean pooling, accuracy
over five folds, a session held out each time.

    python evaluate_er.py --upstream runs/avg/student.pt --data data/IEMOCAP
    python evaluate_er.py --upstream runs/avg/student.pt --manifest emotions.csv
    python evaluate_er.py --demo

Running the same command again resumes the run.
"""

import argparse
import os
import re
import signal
import sys

import numpy as np
import soundfile
import torch

import data
import probe

# IEMOCAP's four classes; excited counts as happy.
EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n\n")[0].replace("\n", " "))
    parser.set_defaults(data="data/IEMOCAP", steps=30_000, lr=1e-4)
    parser.add_argument("--manifest", help="a .csv of path,label,fold instead of IEMOCAP; paths from its folder")
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=probe.DEMO_STUDENT, manifest="data/demo/emotion/emotions.csv")
        parser.set_defaults(steps=600, batch_size=16, lr=1e-2, log_every=300, eval_every=100)
    return probe.finish(parser.parse_args(arguments), "er")


# ---------------------------------------------------------------- data


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
            for number, line in probe.read_lines(path):
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
    rows = probe.read_table(path, ["path", "label", "fold"])
    return os.path.dirname(path), [
        (row["path"], row["label"], row["fold"], f"{path}, line {row['line']}") for row in rows
    ]


def read_folds(root, rows, seed):
    """(classes, {fold: the three probe.Splits}) of rows (path, label, fold, line).

    A fold is tested on by a probe trained on 80% of the others' utterances and chosen on the other 20%, drawn by the seed.
    """
    classes = sorted({label for _, label, _, _ in rows})
    corpus, places = probe.labelled_corpus(root, [row[0] for row in rows], [row[3] for row in rows])
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


def write_demo_manifest(path):
    """Four ways to say the demo's sentences: as they are, fast and high, slow and soft, loud and rough. A fold a speaker."""
    folder, source, lines = os.path.dirname(path), "data/demo/train-clean-100", ["path,label,fold\n"]
    os.makedirs(folder, exist_ok=True)
    ways = {
        "neutral": lambda x, time: x,
        "happy": lambda x, time: np.interp(time * 1.25, time, x)[: int(len(x) / 1.25)],
        "sad": lambda x, time: 0.3 * np.interp(np.arange(int(len(x) / 0.85)) * 0.85, time, x),
        "angry": lambda x, time: np.clip(6 * x, -0.9, 0.9),
    }
    for speaker in sorted(os.listdir(source))[:5]:
        names = sorted(name for name in os.listdir(f"{source}/{speaker}/1") if name.endswith(".flac"))
        for number, name in enumerate(names[:20]):
            audio = data.read_audio(f"{source}/{speaker}/1/{name}").numpy()
            label, way = list(ways.items())[number % 4]
            soundfile.write(os.path.join(folder, name), way(audio, np.arange(len(audio))), data.SAMPLE_RATE)
            lines.append(f"{name},{label},{speaker}\n")
    with probe.refusing():
        probe.save_atomically(path, lambda file: file.write("".join(lines).encode()))


# ---------------------------------------------------------------- the task


def main(arguments=None):
    args = parse(arguments)
    if args.demo:
        probe.prepare_demo()
        if not os.path.exists("data/demo/emotion/emotions.csv"):
            write_demo_manifest("data/demo/emotion/emotions.csv")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with probe.refusing():
        rows = read_manifest(args.manifest) if args.manifest else read_iemocap(args.data)
        classes, folds = read_folds(*rows, args.seed)
        upstream = probe.Upstream(args.upstream, device, args.precision)
    corpus = next(iter(folds.values()))[0].corpus
    states = {corpus: probe.States(upstream, corpus)}
    print(f"{len(corpus):,} utterances, {len(classes)} classes, {len(folds)} folds; {len(corpus.left_out)} left out")
    print(f"upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    results, right, references, hypotheses = {}, [], {}, {}
    for fold, splits in folds.items():
        print(f"\nfold {fold}: {'; '.join(probe.describe(split) for split in splits)}", flush=True)
        here = argparse.Namespace(**vars(args) | {"out": os.path.join(args.out, f"fold-{fold}")})
        result, predictions = probe.evaluate(
            here,
            "accuracy",
            upstream,
            states,
            splits,
            make_head=lambda dim: probe.MeanHead(dim, len(classes)),
            loss=probe.class_loss,
            decode=probe.class_of,
            count=probe.right,
            higher_is_better=True,
        )
        if predictions is None:
            predictions = [classes.index(label) for label in result["hypotheses"]]
        else:
            result = {"task": f"emotion recognition, fold {fold}", **result}
            result["hypotheses"] = [classes[prediction] for prediction in predictions]
            probe.write_report(here, result)
        results[fold] = result
        right.append(probe.right(splits[2].labels, predictions))
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
        "interval": probe.bootstrap(*right),
        "deviation": float(np.std(list(accuracies.values()), ddof=1)),
        "folds": accuracies,
        "confusion": confusion,
        "layer_weights": np.mean([result["layer_weights"] for result in results.values()], axis=0).tolist(),
        "counts": {"test": {"utterances": len(references), "left_out": len(corpus.left_out)}},
        "seconds": {what: round(sum(r["seconds"][what] for r in results.values()), 2) for what in first["seconds"]},
        "upstream": first["upstream"],
        "settings": vars(args),
        "versions": first["versions"],
    }
    probe.write_report(args, result, ref=references, hyp=hypotheses)
    show(args, result)


def show(args, result):
    """The result as a person reads it."""
    low, high = result["interval"]
    print(f"\nEmotion recognition of {args.upstream}, the mean over {len(result['folds'])} folds")
    print(f"  {'accuracy':13}  {result['accuracy']:8.2%}  95% interval {low:.2%} to {high:.2%}")
    print(f"  {'deviation':13}  {result['deviation']:8.2%}  of the folds")
    for fold, accuracy in result["folds"].items():
        print(f"  {f'fold {fold}':13}  {accuracy:8.2%}")
    classes = list(result["confusion"])
    width = max(map(len, classes)) + 2
    print(f"  {'said, heard as':{width}}{''.join(name.rjust(width) for name in classes)}")
    for label, row in result["confusion"].items():
        print(f"  {label:{max(width, 14)}}{''.join(str(count).rjust(width) for count in row.values())}")
    print("  learned weights of the hidden states, the mean over folds:")
    print("\n".join(probe.bars(result["layer_weights"])))
    print(f"{args.out}: result.json, test.hyp, test.ref")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
