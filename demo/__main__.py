"""What an ensemble is for: synthetic speech, three teachers that differ, and their students.

    python -m demo          # students of HuBERT, of WavLM and of the average of three: 8 minutes
    python -m demo --all    # every row and task of superb/reproduce.sh, five seeds: 2 hours

Runs superb/reproduce.sh, which prints the commands of train.py, evaluate_pr.py and superb, and the
table of scores after each row. Writes to data/demo and runs/demo alone. The same command resumes.
"""

import os
import sys

import program
from demo import speech

HERE = os.path.relpath(os.path.dirname(os.path.abspath(__file__)))
OUT = "runs/demo"
# float32: in bf16, oneDNN compiles each convolution for each length, which takes most of the time.
PROBE = "--steps 600 --eval-every 200 --batch-size 16 --lr-decay --precision fp32"
SETTINGS = {  # variables of superb/reproduce.sh
    "DATA": speech.DATA,
    "LEXICON": f"{speech.DATA}/lexicon.txt",
    "VOXCELEB": f"{speech.DATA}/speakers.csv",
    "IEMOCAP": f"{speech.DATA}/emotion/emotions.csv",
    "NOISE": f"{speech.DATA}/noise",
    "SNR": "0",
    "TEACHERS": ",".join(f"{HERE}/{name}.pt" for name in ("hubert", "robust_hubert", "wavlm")),
    "HEADS": "2,3,4",
    "STEPS": "1500",
    # From random weights: the first layers of the demo's teachers alone would solve its tasks.
    "TRAIN": "--splits train-clean-100 --init none --batch-size 16 --lr 2e-3 --max-seconds 1.6 "
    f"--valid dev-clean --valid-every 500 --workers 0 --cache {OUT}/targets",
    "RATES": "1e-2,3e-3",
    "PR": PROBE,
    "SID": PROBE,
    "ER": PROBE,
    "OUT": OUT,
    # Two threads are hardly faster than one, nor two GPUs: the networks are tiny.
    "JOBS": str(min(4, program.cores())),
    "PROCESSES": "1",
}
# The average's student first: it may be enough.
DEFAULT_ROWS = ["avg", "hubert", "wavlm", "fbank", "untrained"]


def reproduce(rows, tasks, seeds):
    """Becomes superb/reproduce.sh, for these rows (none: all), tasks and seeds."""
    chosen = {"ROWS": " ".join(rows), "TASKS": " ".join(tasks), "SEEDS": " ".join(seeds)}
    # The python of this program, in a virtual environment that is not activated too.
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    chosen["PATH"] = path
    script = os.path.join(HERE, "..", "superb", "reproduce.sh")
    os.execvpe("bash", ["bash", script], SETTINGS | os.environ | chosen)


def main(arguments=None):
    program.init()
    parser = program.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--all", action="store_true", help="all rows and tasks, seeds 0 to 4")
    add("--rows", type=program.names, help="folders of rows, such as avg,none,teacher-hubert")
    add("--tasks", type=program.names, default="pr,sid", help="of pr, pr-noise, sid, er")
    add("--seeds", type=program.names, default="0", help="of students and probes")
    with program.one_line_errors():
        args = parser.parse_args(arguments)
        speech.prepare()
    rows = args.rows or DEFAULT_ROWS
    if args.all:
        rows, args.tasks, args.seeds = [], ["pr", "pr-noise", "sid", "er"], list("01234")
    reproduce(rows, args.tasks, args.seeds)


if __name__ == "__main__":
    program.run(main)
