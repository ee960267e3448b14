"""The folder of one training run: its manifest, settings, metrics and checkpoints."""

import contextlib
import json
import os
import subprocess
import time
import warnings

import torch

import checkpoint
import manifest
import program
from data import SAMPLE_RATE
from program import RANK, WORLD_SIZE
from student import save_student

CONTENT = ("step", "settings", "student", "optimizer")  # required in last.pt


class Run:
    """A new run in the folder args.out, or the one that is there, at its newest checkpoint.

    The folder is locked. A new run lists its audio in manifest.tsv.
    settings: {name: value} that must not change when a run resumes.
    start: the step of the checkpoint, 0 for a new run.
    Raises ValueError if the settings differ, and as find_corpus does.
    """

    def __init__(self, args, settings):
        self.args, self.settings, self.folder = args, settings, args.out
        self.manifest = os.path.join(self.folder, "manifest.tsv")
        if RANK == 0:
            checkpoint.lock(self.folder)
        self.saved = checkpoint.load_latest(self.folder, CONTENT)
        self.start = self.saved["step"] if self.saved else 0
        self.files_found = None  # at the start of the run
        if self.saved:
            checkpoint.check_same(self.folder, self.saved["settings"], settings)
            self.files_found = self.saved.get("files_found")
            self.warn_of_new_files()
        elif RANK == 0:
            if os.path.realpath(args.data) == os.path.realpath(self.manifest):
                raise ValueError(f"{args.data}: would be overwritten; choose another --out")
            corpus = manifest.find_corpus(args.data, args.splits, args.max_seconds)
            self.files_found = corpus.file_count() + len(corpus.skipped)
            manifest.warn_skipped(corpus.skipped)
            manifest.write_manifest(self.manifest, corpus)

    def warn_of_new_files(self):
        """On resuming, warns if --data has more audio files than the run."""
        args = self.args
        if RANK > 0 or self.files_found is None or args.data.endswith(".tsv"):
            return
        with contextlib.suppress(OSError):  # the audio may have moved
            new = len(manifest.list_audio(args.data, args.splits)) - self.files_found
            if new > 0:
                text = f"{args.data}: {new} new audio files are not in this run"
                warnings.warn(f"{text}; a run in another --out takes them")

    def corpus(self):
        """The Corpus of the manifest: what the run began with, wherever the audio is now."""
        root = self.args.data
        if root.endswith(".tsv"):
            root = manifest.read_root(root)
        return manifest.read_manifest(self.manifest, root)

    def begin(self, student, optimizer, batches, stop):
        """Before the first step: restores the checkpoint, if there is one, and starts the log.

        batches: the TrainBatches. stop: the program.StopSignal that ends the run.
        """
        self.student, self.optimizer, self.stop = student, optimizer, stop
        noise_files = batches.noise.corpus.file_count() if batches.noise else 0
        self.totals = {"audio": batches.corpus.file_count(), "noise": noise_files}
        self.skipped = {kind: {} for kind in self.totals}  # {path: reason}, later of all ranks
        self.reported = {kind: set() for kind in self.totals}
        self.terms, self.samples = [], 0  # since the last line of metrics
        self.done = self.start  # the last finished step
        if self.saved:
            student.load_state_dict(self.saved["student"])
            optimizer.load_state_dict(self.saved["optimizer"])
            self.saved = None
        if RANK == 0:
            write_config(self.args, student.head_names)
            self.log = Log(self.args, student.head_names, self.start)
            verb = "resuming at step" if self.start else "step"
            program.say(f"{self.folder}: {verb} {self.start} of {self.args.steps}")

    def saving(self, batches):
        """Yields the batches. If rank 0 cannot read the next one, it saves the step before."""
        try:
            yield from batches
        except (ValueError, SystemExit):  # SystemExit: a signal while waiting for it
            if RANK == 0 and self.done > self.start:
                self.save()
            raise

    def after_step(self, step, batch, terms, norm, held_out_terms):
        """Prints warnings and metrics, saves; on a signal all ranks exit after the same step.

        terms: per part of the batch (2, heads), L1 and cosine.
        held_out_terms: the mean over held-out batches, or None.
        """
        args, self.done = self.args, step
        self.terms += terms
        self.samples += batch["waveforms"].numel() * WORLD_SIZE
        for kind, skipped in batch["skipped"].items():
            self.skipped[kind] |= skipped
        signal = self.stop.received()  # on any rank
        is_last = step == args.steps or signal > 0
        log_now = is_last or step % args.log_every == 0 or step == self.start + 1
        if log_now or held_out_terms is not None:
            self.report_skipped()
            means = program.mean(torch.stack(self.terms).mean(0))
            if RANK == 0:
                lr, audio = self.optimizer.param_groups[0]["lr"], self.samples / SAMPLE_RATE
                self.log.write(step, means, lr, float(norm), audio, held_out_terms)
            self.terms, self.samples = [], 0
        elif RANK == 0:
            self.log.progress.show(step)
        if RANK == 0 and (is_last or step % args.save_every == 0):
            self.save()
        if signal:
            if RANK == 0:
                program.say(f"{self.folder}: step {step} is saved, the same command resumes there")
            program.gather(None)  # until rank 0 has saved: torchrun ends all as soon as one exits
            raise SystemExit(128 + signal)

    def report_skipped(self):
        """Warns of the files skipped on any rank; saves and exits for over 1% of a kind."""
        for kind, total in self.totals.items():
            skipped = {}
            for skipped_by_rank in program.gather(self.skipped[kind]):
                skipped |= skipped_by_rank
            new = {path: why for path, why in skipped.items() if path not in self.reported[kind]}
            manifest.warn_skipped(new)
            self.skipped[kind], self.reported[kind] = skipped, set(skipped)
            with program.one_line_errors():
                try:
                    manifest.check_skipped(skipped, total, kind)
                except ValueError as error:
                    if RANK == 0:
                        self.save()
                    raise ValueError(f"{error}; step {self.done} is saved") from None

    def end(self):
        """Prints the student's path, after the loop; saves if it is missing, or --steps is 0."""
        if RANK == 0:
            student = os.path.join(self.folder, "student.pt")
            if self.args.steps == 0 or not os.path.exists(student):
                self.save()
            program.say(f"{student}: the student")

    def save(self):
        """Writes the last finished step: student.pt, the student alone, then last.pt, to resume."""
        args, student = self.args, self.student
        about = {"teachers": self.settings["--teachers"], "agg": args.agg, "layers": args.layers}
        about |= {"step": self.done, "data": os.path.basename(os.path.realpath(args.data))}
        save_student(student, os.path.join(self.folder, "student.pt"), **about)
        content = {"step": self.done, "settings": self.settings, "files_found": self.files_found}
        content |= {"student": student.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(os.path.join(self.folder, "last.pt"), content, keep_previous=True)


class Log:
    """Metrics, means over all ranks: printed, in OUT/metrics.jsonl, and for TensorBoard."""

    def __init__(self, args, heads, start):
        self.args, self.heads, self.board = args, heads, None
        self.time = time.monotonic()  # of the last line
        self.progress = program.Progress("step", args.steps, start)
        self.path = os.path.join(args.out, "metrics.jsonl")
        if os.path.exists(self.path):  # drop what was written after the checkpoint
            with open(self.path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("}\n")]
            lines = [line for line in lines if json.loads(line)["step"] <= start]
            checkpoint.save(self.path, "".join(lines))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=start + 1)

    def write(self, step, means, lr, norm, audio, held_out_terms):
        """means: (2, heads), L1 and cosine; audio: seconds; both since the last line.

        held_out_terms: (2, heads) too, or None.
        """
        seconds = time.monotonic() - self.time
        self.time = self.progress.printed = time.monotonic()
        loss, l1, cosine = self.loss(means)
        text = f"loss {loss:.4f}  L1 {l1:.4f}  cosine {cosine:.4f}  lr {lr:.2e}"
        row = {"step": step, "loss": loss, "l1": l1, "cosine": cosine, "lr": lr, "norm": norm}
        row["seconds"] = seconds
        for head, (head_l1, head_cosine) in zip(self.heads, means.t().tolist()):
            row |= {f"l1/{head}": head_l1, f"cosine/{head}": head_cosine}
        if held_out_terms is not None:
            row["valid"], row["valid_l1"], row["valid_cosine"] = self.loss(held_out_terms)
            text += f"  valid {row['valid']:.4f}"
        text += f"  {audio / seconds:.3g} s of audio/s  {self.progress.left(step)}"
        program.say(f"step {step}/{self.args.steps}  {text}")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def loss(self, terms):
        """[loss, L1, cosine], means over the heads of (2, heads)."""
        l1, cosine = terms.mean(dim=1).tolist()
        return [l1 + self.args.cosine_weight * cosine, l1, cosine]


def write_config(args, heads):
    """Writes OUT/config.json: settings, heads, version, and the commit of a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    config = {"settings": vars(args), "heads": heads, "processes": WORLD_SIZE}
    config |= {"torch": torch.__version__, "commit": commit or "not recorded"}
    checkpoint.save(os.path.join(args.out, "config.json"), json.dumps(config, indent=2))
