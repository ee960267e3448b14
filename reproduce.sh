#!/usr/bin/env bash
# The paper's comparison (arXiv:2302.12757), one command: students of each teacher alone, of pairs and of all, averaged,
# concatenated and with heads of their own, with one head and with several, beside an untrained student, the teachers and
# filter banks, on SUPERB's four tasks; then one table and one picture.
#
#     bash reproduce.sh                                     # the real run; says first what it takes
#     SEEDS="0 1 2" CACHE=cache bash reproduce.sh           # any of the variables below
#     bash reproduce.sh --demo                              # all of it on the demo's speech, in a quarter of an hour
#
# Started again it carries on. A part that failed is named, has its log in OUT/logs, and does not stop the others.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
demo=()
if [ "${1-}" = --demo ]; then
    demo=(--demo)
    : "${TEACHERS=$here/demo/hubert.pt,$here/demo/robust_hubert.pt,$here/demo/wavlm.pt}" "${HEADS=2,3,4}" "${STEPS=100}"
    : "${OUT=runs/reproduce-demo}" "${AUDIO=data/demo}" "${RATES=1e-1,1e-2,1e-3}" "${TRAIN=--splits train-clean-100}"
    : "${PR=--steps 100}" "${SID=--steps 100}" "${ER=--steps 60}" "${ASR=--steps 60}"
elif [ $# -gt 0 ]; then
    echo "$1: unknown; the settings are variables, see the head of reproduce.sh" >&2
    exit 2
fi

DATA=${DATA-data/LibriSpeech}                        # LibriSpeech: PR and ASR train and test there
AUDIO=${AUDIO-$DATA}                                 # what the students hear: a folder, or a manifest (.tsv)
LEXICON=${LEXICON-data/librispeech-lexicon.txt}
VOXCELEB=${VOXCELEB-data/VoxCeleb1}                  # the folder, or a .csv for evaluate_sid.py --manifest
IEMOCAP=${IEMOCAP-data/IEMOCAP}                      # the folder, or a .csv for evaluate_er.py --manifest
TEACHERS=${TEACHERS-hubert,robust_hubert,wavlm_plus}
HEADS=${HEADS-4,8,12}                                # the row with one head has the last of them
STEPS=${STEPS-200000}
SEEDS=${SEEDS-0}
TASKS=${TASKS-pr sid er asr}
PAIRS=${PAIRS-yes}                                   # the rows of two teachers; empty: none
RATES=${RATES-1e-1,1e-2,1e-3,1e-4,1e-5}              # learning rates of each probe
TRAIN=${TRAIN-} PR=${PR-} SID=${SID-} ER=${ER-} ASR=${ASR-}   # further flags of train.py and the evaluate_*.py
CACHE=${CACHE-}                                      # folder for kept targets and states, of one row at a time
CACHE=${CACHE:+$CACHE/reproduce}                     # what is deleted there is its own
OUT=${OUT-runs/reproduce}
PROCESSES=${PROCESSES-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}   # of train.py


# ---------------------------------------------------------------- the rows

name() { name=$(basename "$1"); echo "${name%.*}"; }

IFS=, read -ra teachers <<<"$TEACHERS"
students=() of=() flags=()                           # each student's row, its teachers, its other settings
student() { students+=("$1"); of+=("$2"); flags+=("$3"); }
for one in "${teachers[@]}"; do student "$(name "$one")" "$one" "--agg avg"; done
for ((i = 0; i < ${#teachers[@]}; i++)); do
    for ((j = i + 1; j < ${#teachers[@]} && ${#teachers[@]} > 2; j++)); do
        a=${teachers[i]} b=${teachers[j]}
        [ -z "$PAIRS" ] || student "$(name "$a")+$(name "$b")" "$a,$b" "--agg avg"
    done
done
for agg in avg concat none; do student $agg "$TEACHERS" "--agg $agg"; done
student avg-one-head "$TEACHERS" "--agg avg --heads ${HEADS##*,}"
student untrained "${teachers[0]}" "--agg avg --steps 1 --lr 1e-30"   # as it begins: a step too small to change a weight

# ---------------------------------------------------------------- how a part is run

mkdir -p "$OUT/logs" || exit 2
asked=$(printf '%s\n' "$DATA" "$AUDIO" "$LEXICON" "$VOXCELEB" "$IEMOCAP" "$TEACHERS" "$HEADS" "$STEPS" "$RATES" \
    "TRAIN $TRAIN" "PR $PR" "SID $SID" "ER $ER" "ASR $ASR")
if [ -e "$OUT/asked" ] && ! difference=$(diff "$OUT/asked" - <<<"$asked"); then
    echo "$OUT: begun with other settings (${difference//$'\n'/ }); restore them, or give another OUT" >&2
    exit 2
fi
echo "$asked" >"$OUT/asked"

declare -A spent=() times=() left=()                 # seconds, how often, how often still, of each kind of part
failed=()

part() {  # part KIND FINISHED NAME COMMAND...: runs it where the file FINISHED is not there yet
    local kind=$1 finished=$2 what=$3 began=$SECONDS code
    shift 3
    ((left[$kind]--))
    [ -e "$finished" ] && return
    "$@" >"$OUT/logs/${what//\//.}.log" 2>&1
    code=$?
    if ((code == 130 || code == 143)); then
        echo "interrupted in $what; the same command carries on" >&2
        exit $code
    elif ((code)); then
        failed+=("$what")
        echo "$what: failed, $(tail -n 1 "$OUT/logs/${what//\//.}.log")" >&2
        return
    fi
    ((spent[$kind] += SECONDS - began, times[$kind]++))
    echo "$what: $((SECONDS - began)) s; $(expected)"
}

expected() {  # what is left, from the parts of each kind that were run so far
    local kind seconds=0 unknown=()
    for kind in distil $TASKS; do
        if ((${times[$kind]-0})); then
            ((seconds += left[$kind] * spent[$kind] / times[$kind]))
        elif ((${left[$kind]})); then
            unknown+=("$kind")
        fi
    done
    printf 'at most %d:%02d hours left%s' $((seconds / 3600)) $((seconds / 60 % 60)) "${unknown:+ beside ${unknown[*]}}"
}

distil() {  # distil FOLDER FLAGS...
    local command=(python)
    ((PROCESSES > 1)) && command=(torchrun --standalone --nproc_per_node="$PROCESSES")
    "${command[@]}" "$here/train.py" "${demo[@]}" --data "$AUDIO" --heads "$HEADS" --steps "$STEPS" $TRAIN \
        --out "$@" && touch "$1/finished"
}

judge() {  # judge TASK UPSTREAM FOLDER FLAGS...
    local task=$1 data=()
    case $task${demo[*]} in
        pr) data=(--data "$DATA" --lexicon "$LEXICON") ;;
        asr) data=(--data "$DATA") ;;
        sid) if [ -d "$VOXCELEB" ]; then data=(--data "$VOXCELEB"); else data=(--manifest "$VOXCELEB"); fi ;;
        er) if [ -d "$IEMOCAP" ]; then data=(--data "$IEMOCAP"); else data=(--manifest "$IEMOCAP"); fi ;;
    esac
    local more=${task^^}
    python "$here/evaluate_$task.py" "${demo[@]}" "${data[@]}" --upstream "$2" --out "$3" --lr "$RATES" ${!more} "${@:4}"
}

tasks() {  # tasks ROW [UPSTREAM]: a row without is a student's, which has one for each seed
    local seed task upstream
    for seed in $SEEDS; do
        for task in $TASKS; do
            upstream=${2-$OUT/$1/seed-$seed/student.pt}
            [ $# = 2 ] || [ -e "$upstream" ] || { ((left[$task]--)); continue; }   # it failed, and was named
            local folder=$OUT/$1/seed-$seed/$task
            part "$task" "$folder/result.json" "$1/seed-$seed/$task" \
                judge "$task" "$upstream" "$folder" --seed "$seed" ${CACHE:+--cache "$CACHE/$1"}
        done
    done
    [ -z "$CACHE" ] || rm -rf "${CACHE:?}/$1"        # the disk holds one row's at a time
}

# ---------------------------------------------------------------- the plan

seeds=$(wc -w <<<"$SEEDS")
rows=$((${#students[@]} + ${#teachers[@]} + 1))
left[distil]=$((${#students[@]} * seeds))
for task in $TASKS; do left[$task]=$((rows * seeds)); done
echo "students, each with seed $SEEDS: ${students[*]}"
echo "also judged: the teachers, filter banks; on $TASKS; ${left[distil]} distillations and $((rows * seeds)) probes of each task"
plan=$OUT/expected
if [ ! -e "$plan" ]; then                            # how fast this machine is, from a few real steps
    trial=$(mktemp -d "$OUT/logs/trial.XXXXXX")
    if ! distil "$trial" --teachers "$TEACHERS" --steps 4 --log-every 1 --save-every 2 >"$trial.log" 2>&1; then
        echo "a trial of 4 steps failed: $(tail -n 1 "$trial.log")" >&2
        exit 2
    fi
    for task in $TASKS; do
        for judged in teacher student; do
            who=${teachers[0]} log=$trial.$task.$judged.log
            [ $judged = teacher ] || who=$trial/student.pt
            judge "$task" "$who" "$trial/none" --plan ${CACHE:+--cache "$CACHE"} >"$log" 2>&1 && continue
            echo "$task cannot be run: $(tail -n 1 "$log")" >&2
            plan=$trial.expected                     # not kept: the next start tries again
            break
        done
    done
    PYTHONPATH=$here python - "$trial" "$STEPS" "$seeds" ${#teachers[@]} ${#students[@]} "$CACHE" $TASKS >"$plan" <<'PYTHON'
import glob, json, os, re, sys
from report import clock
from student import load_student

trial, (steps, seeds, teachers, students), cache, tasks = sys.argv[1], map(int, sys.argv[2:6]), sys.argv[6], sys.argv[7:]

def read(name):
    with open(trial + name, encoding="utf-8") as file:
        return file.read()

later = [json.loads(line) for line in read("/metrics.jsonl").splitlines()][1:]
distil = sum(row["seconds"] for row in later) / len(later) * steps
total, states = distil * students * seeds, {}
print(f"  a student of all teachers {clock(distil)} without CACHE")
for task in tasks:
    logs = [read(f".{task}.{of}.log") for of in ("teacher", "student") if os.path.exists(f"{trial}.{task}.{of}.log")]
    found = [re.search(r"^about (?:(\d+) d )?(\d+):(\d+):(\d+): ", log, re.M) for log in logs]
    if len(found) == 2 and all(found):
        parts = [[int(number or 0) for number in one.groups()] for one in found]
        teacher, student = (((days * 24 + hours) * 60 + minutes) * 60 + rest for days, hours, minutes, rest in parts)
        total += (teacher * teachers + student * (students + 1)) * seeds    # filter banks as a student
        states[task] = float(re.search(r"^states: .* dims, (\S+) GB", logs[0], re.M)[1])
        print(f"  {task} of a teacher {clock(teacher)}, of a student {clock(student)}")
disk = sum(map(os.path.getsize, glob.glob(f"{trial}/*"))) * students * seeds / 1e9
print(f"  in all about {clock(total)}, and {disk:.3g} GB in OUT", end="")
if cache:   # concat and none keep every teacher's, in bf16
    hours = float(re.search(r"([\d.,]+) hours", read(".log"))[1].replace(",", ""))
    heads, dim = sum(name.startswith("l1/") for name in later[0]), load_student(f"{trial}/student.pt").encoder.config.dim
    targets = hours * 3600 * 50 * heads * dim * teachers * 2 / 1e9
    most = sum(states.values()) - min(states.get("pr", 0), states.get("asr", 0))   # the same audio
    print(f"; in CACHE a row's targets and states at a time, up to about {targets:.3g} and {most:.3g} GB", end="")
print()
PYTHON
    rm -r "$trial"
fi
echo "expected:"
cat "$plan"

# ---------------------------------------------------------------- all of it

tasks fbank fbank
for teacher in "${teachers[@]}"; do tasks "teacher-$(name "$teacher")" "$teacher"; done
for ((i = 0; i < ${#students[@]}; i++)); do
    row=${students[i]}
    cache=()
    [ -z "$CACHE" ] || [ $row = untrained ] || cache=(--cache "$CACHE/$row")
    for seed in $SEEDS; do
        part distil "$OUT/$row/seed-$seed/finished" "$row/seed-$seed" \
            distil "$OUT/$row/seed-$seed" --teachers "${of[i]}" ${flags[i]} --seed "$seed" "${cache[@]}"
    done
    tasks "$row"
done

results=()
for row in fbank "${teachers[@]/#/teacher:}" "${students[@]}"; do
    [[ $row == teacher:* ]] && row=teacher-$(name "${row#teacher:}")
    for task in pr sid er asr; do
        for result in "$OUT/$row"/seed-*/$task/result.json; do
            [ -e "$result" ] && results+=("$(dirname "$result")")
        done
    done
done
python "$here/report.py" "${results[@]}" --against avg --to "$OUT/results.md,$OUT/results.csv" \
    --picture "$OUT/results.svg" --layers "$OUT/layers.svg" || failed+=("report.py")
if ((${#failed[@]})); then
    echo "failed, with a log in $OUT/logs: ${failed[*]}; the same command tries them again" >&2
    exit 1
fi
