"""Speaker identification, as SUPERB judges a speech encoder (arXiv:2105.01051): the frozen upstream, mean pooling, accuracy.

    python evaluate_sid.py --upstream runs/avg/student.pt --data data/VoxCeleb1
    python evaluate_sid.py --upstream runs/avg/student.pt --manifest speakers.csv
    python evaluate_sid.py --demo

Where this is not s3prl: a training crop of 8 seconds is cut from the whole utterance's hidden states, not from its
waveform, so that the states can be kept. Running the same command again resumes the run.
"""

import os
import signal
import sys

import torch

import probe

SPLITS = {"1": "train", "2": "dev", "3": "test"}  # in VoxCeleb1's iden_split.txt


def parse(arguments=None):
    """Settings from the command line. Bad ones end the program with one line and exit code 2."""
    parser = probe.parser(__doc__.split("\n")[0])
    parser.set_defaults(data="data/VoxCeleb1", steps=200_000, lr=1e-4, eval_every=4000)
    parser.add_argument(
        "--manifest", help="a .csv of path,label,split (train, dev, test) instead of VoxCeleb1; paths from its folder"
    )
    parser.add_argument(
        "--crop", type=float, default=8.0, help="seconds of an utterance that a training step sees at most"
    )
    if parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(upstream=probe.DEMO_STUDENT, manifest="data/demo/speakers.csv")
        parser.set_defaults(steps=1500, batch_size=16, lr=5e-3, log_every=500, eval_every=250)
    args = probe.finish(parser.parse_args(arguments), "sid")
    if not args.crop >= 0.1:
        probe.stop(f"argument --crop: {args.crop}: must be 0.1 or more")
    return args


# ---------------------------------------------------------------- data


def read_iden_split(folder):
    """(root, [(path, speaker, split, line)]) of VoxCeleb1, whose iden_split.txt lies in its folder.

    Raises FileNotFoundError and ValueError naming the line.
    """
    path = os.path.join(folder, "iden_split.txt")
    if not os.path.isfile(path):
        where = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
        raise FileNotFoundError(f"{path}: no such file; give --data the folder of VoxCeleb1 with {where} in it")
    # The two archives unpack to wav/, or to dev/wav/ and test/wav/.
    roots = [root for root in ("wav", "dev/wav", "test/wav") if os.path.isdir(os.path.join(folder, root))]
    rows = []
    for number, line in probe.read_lines(path):
        split, _, audio = line.strip().partition(" ")
        if split not in SPLITS or not audio:
            raise ValueError(f"{path}, line {number}: not '1|2|3 SPEAKER/VIDEO/FILE.wav' but {line.strip()[:60]!r}")
        found = [os.path.join(root, audio) for root in roots if os.path.isfile(os.path.join(folder, root, audio))]
        rows.append(
            (found[0] if found else f"wav/{audio}", audio.split("/")[0], SPLITS[split], f"{path}, line {number}")
        )
    return folder, rows


def read_manifest(path):
    """(root, [(path, speaker, split, line)]) of a .csv of path,label,split. Raises FileNotFoundError and ValueError."""
    rows = []
    for row in probe.read_table(path, ["path", "label", "split"]):
        line = f"{path}, line {row['line']}"
        if row["split"] not in SPLITS.values():
            raise ValueError(f"{line}: the split {row['split']!r} is none of train, dev, test")
        rows.append((row["path"], row["label"], row["split"], line))
    return os.path.dirname(path), rows


def read_splits(root, rows):
    """(speakers, the three probe.Splits) of rows (path, speaker, split, line); a label is the speaker's place among them."""
    speakers = sorted({speaker for _, speaker, split, _ in rows if split == "train"})
    corpus, places = probe.labelled_corpus(root, [row[0] for row in rows], [row[3] for row in rows])
    splits = []
    for name in SPLITS.values():
        mine = [row for row in rows if row[2] == name]
        for _, speaker, _, line in mine:
            if speaker not in speakers:
                raise ValueError(f"{line}: the speaker {speaker} has no utterance to train on")
        usable = [row for row in mine if row[0] in places]
        if not usable:
            raise ValueError(f"no utterances of the split {name}")
        left_out = {path: reason for path, reason in corpus.left_out.items() if path in {row[0] for row in mine}}
        labels = [torch.tensor(speakers.index(row[1])) for row in usable]
        splits.append(
            probe.Split(name, corpus, [places[row[0]] for row in usable], [row[0] for row in usable], labels, left_out)
        )
    return speakers, splits


def write_demo_manifest(path):
    """The demo's six training speakers, each one's utterances dealt to train, dev and test."""
    root, folder = os.path.dirname(path), "train-clean-100"
    lines = ["path,label,split\n"]
    for speaker in sorted(os.listdir(os.path.join(root, folder))):
        place = f"{folder}/{speaker}/1"
        files = sorted(name for name in os.listdir(os.path.join(root, place)) if name.endswith(".flac"))
        splits = ["test", "dev", "train", "train", "train"]
        lines += [f"{place}/{name},{speaker},{splits[number % 5]}\n" for number, name in enumerate(files)]
    with probe.refusing():
        probe.save_atomically(path, lambda file: file.write("".join(lines).encode()))


# ---------------------------------------------------------------- the task


def main(arguments=None):
    args = parse(arguments)
    if args.demo:
        probe.prepare_demo()
        write_demo_manifest("data/demo/speakers.csv")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with probe.refusing():
        speakers, splits = read_splits(*(read_manifest(args.manifest) if args.manifest else read_iden_split(args.data)))
        upstream = probe.Upstream(args.upstream, device, args.precision)
    for split in splits:
        print(probe.describe(split))
    print(f"{len(speakers):,} speakers; upstream: {args.upstream}, {upstream.precision} on {device.type}", flush=True)

    result, predictions = probe.evaluate(
        args,
        "accuracy",
        upstream,
        {splits[0].corpus: probe.States(upstream, splits[0].corpus)},
        splits,
        make_head=lambda dim: probe.MeanHead(dim, len(speakers), upstream.frames(int(args.crop * 16000))),
        loss=probe.class_loss,
        decode=probe.class_of,
        count=probe.right,
        higher_is_better=True,
    )
    if predictions is not None:
        test = splits[2]
        result = {"task": "speaker identification", **result, "speakers": len(speakers)}
        probe.write_report(
            args,
            result,
            ref={name: [speakers[int(label)]] for name, label in zip(test.ids, test.labels)},
            hyp={name: [speakers[prediction]] for name, prediction in zip(test.ids, predictions)},
        )
    probe.show(args, result, "dev", "test", [("out of", result["speakers"], "speakers")])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
