#!/usr/bin/env bash
# The comparison of arXiv:2302.12757 in SUPERB's tasks: students of one, two and all teachers, the
# teachers and two baselines. Prints every command, and writes results.md and pictures to OUT.
# The same command resumes. An aggregation that is added to aggregate.py gets a row too.
#
#     bash superb/reproduce.sh                              # LibriSpeech, VoxCeleb1, IEMOCAP
#     SEEDS="0 1 2" CACHE=cache bash superb/reproduce.sh    # any of the variables below
set -uo pipefail
root=$(CDPATH= cd -- "$(dirname "$0")/.." >/dev/null && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
here=$root/ prefix="PYTHONPATH=$(printf %q "$root") "     # of printed commands
[ "$PWD" = "$root" ] && here="" prefix=""

refuse() {
    echo "reproduce.sh: $1" >&2
    exit 2
}

[ $# = 0 ] || refuse "$1: unknown; settings are variables, see the top of the script"

DATA=${DATA-data/LibriSpeech}             # LibriSpeech, for PR and ASR
AUDIO=${AUDIO-$DATA}                      # audio for distillation: a folder or a manifest.tsv
LEXICON=${LEXICON-data/librispeech-lexicon.txt}
VOXCELEB=${VOXCELEB-data/VoxCeleb1}       # a folder, or a .csv for --manifest of superb.sid
IEMOCAP=${IEMOCAP-data/IEMOCAP}           # a folder, or a .csv for --manifest of superb.er
TEACHERS=${TEACHERS-hubert,robust_hubert,wavlm_plus}
NAMES=${NAMES-HuBERT,RobustHuBERT,WavLM}  # of the teachers, in table and pictures
TEACHERS=${TEACHERS//, /,} NAMES=${NAMES//, /,}
HEADS=${HEADS-4,8,12}                     # layers of every teacher; avg-one-head: the last alone
STEPS=${STEPS-200000}                     # of distillation
SEEDS=${SEEDS-0}
TASKS=${TASKS-pr sid er asr}              # pr-noise, ...: tested in noise, in a column of its own
NOISE=${NOISE-} SNR=${SNR-5}              # of pr-noise, ...: a folder of noise, and dB or low,high
PAIRS=${PAIRS-yes}                        # students of two teachers; empty for none
ROWS=${ROWS-}                             # folders of the rows to run, in order; empty for all
RATES=${RATES-1e-1,1e-2,1e-3,1e-4,1e-5}   # learning rates of the probes
TRAIN=${TRAIN-} PR=${PR-} SID=${SID-} ER=${ER-} ASR=${ASR-}    # more flags of the programs
CACHE=${CACHE-}                           # folder of cached tensors, deleted once a row is complete
OUT=${OUT-runs/reproduce}
JOBS=${JOBS-1}                            # rows at a time, each on one core
PROCESSES=${PROCESSES-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "JOBS=$JOBS: must be a whole number of at least 1"
for task in $TASKS; do
    [[ $task =~ ^(pr|sid|er|asr)(-noise)?$ ]] ||
        refuse "TASKS: no task $task; there are pr, sid, er, asr, and pr-noise, ..."
    [[ $task != *-noise || -d $NOISE ]] ||
        refuse "NOISE=$NOISE: no such folder; tasks in noise need one"
done
distil=(python)
((PROCESSES > 1)) && distil=(torchrun --standalone --nproc_per_node="$PROCESSES")
distil+=("${here}train.py" --data "$AUDIO" --heads "$HEADS" --steps "$STEPS" $TRAIN)
failed=$(mktemp)                          # names of the parts that failed
trap 'rm -f "$failed"' EXIT
declare -A arguments                      # of row(), per row, quoted for eval
all_rows=() running=0
signals='^(129|130|138|143)$'             # exit codes after HUP, INT, USR1, TERM
((JOBS > 1)) && export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}

stop() {  # the running programs save their state
    local processes
    trap '' HUP INT USR1 TERM
    processes=$(jobs -pr)
    [ -z "$processes" ] || kill $processes
    wait
    exit "$1"
}

stop_on_signals() {
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 138' USR1
    trap 'stop 143' TERM
}

show() {  # prints a command, for a shell in this folder
    local word line=
    for word; do
        [[ $word =~ ^[[:alnum:]@%+=:,./_-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    printf '\n%s%s\n' "$prefix" "${line% }"
}

ignore_signals() {  # in what writes a program's output: a program still prints after a signal
    trap '' HUP INT QUIT USR1 TERM PIPE
}

part() {  # part NAME COMMAND...: runs COMMAND; what it prints is in OUT/logs/NAME.log too
    local name=$1 log=$OUT/logs/${1//\//.}.log start=$SECONDS code reason
    # In the background, so that bash handles signals meanwhile. tee writes the log even if the
    # terminal is closed.
    (show "${@:2}"; exec "${@:2}") 2>&1 | (ignore_signals; exec tee -a "$log") &
    wait $!
    code=$?    # of COMMAND, by pipefail
    if ((code == 0)); then
        echo "$name: $((SECONDS - start)) s"
        return
    fi
    [[ $code =~ $signals ]] && exit $code
    echo "$name" >>"$failed"
    # torchrun prints a table after the error.
    reason=$(tail -n 60 "$log" | grep -E '^[A-Za-z_.]+(\.py|Error|Exception): .' | tail -n 1)
    echo "$name failed: ${reason:-$(tail -n 1 "$log")} ($log)" >&2
    return 1
}

evaluate() {  # evaluate TASK NAME FLAGS...: NAME as in part
    local task=${1%-noise} folder=$OUT/$2 clean=$OUT/${2%-noise} saved new
    local program=(-m "superb.$task") data=(--data "$DATA") flags
    case $task in
        pr) program=("${here}evaluate_pr.py") data+=(--lexicon "$LEXICON") flags=$PR ;;
        sid) data=(--data "$VOXCELEB") flags=$SID ;;
        er) data=(--data "$IEMOCAP") flags=$ER ;;
        asr) flags=$ASR ;;
    esac
    [[ ${data[1]} == *.csv ]] && data[0]=--manifest
    if [ "$task" != "$1" ]; then
        data+=(--noise "$NOISE" --snr "$SNR")
        # The probes are the same: noise is only in the test split.
        for saved in "$clean"/{,fold-*/}last.pt; do
            new=$folder/${saved#"$clean"/}
            [[ -e $saved && ! -e $new ]] || continue
            mkdir -p "${new%/*}" && cp "$saved" "${new%/*}/new.partial"
            mv "${new%/*}/new.partial" "$new"
        done
    fi
    part "$2" python "${program[@]}" "${data[@]}" --lr "$RATES" $flags "${@:3}" --out "$folder"
}

table() {  # table FLAGS...: prints the table of all results
    local results=("$OUT"/*/seed-*/*/result.json) of_avg=("$OUT"/avg/seed-*/*/result.json) against=()
    [ -e "${results[0]}" ] || return 0
    # By its name in rows.tsv, which a user may change.
    [ -e "${of_avg[0]}" ] && against=(--against "$(sed -n 's/^avg\t.*\t//p' "$OUT/rows.tsv")")
    echo
    python -m superb.report "${results[@]%/*}" "${against[@]}" --to "$OUT/results.md" "$@"
}

row() {  # row FOLDER GROUP NAME upstream PATH, or row FOLDER GROUP NAME train TEACHERS FLAGS...
    all_rows+=("$1")
    arguments[$1]=${*@Q}
    grep -q "^$1"$'\t' "$OUT/rows.tsv" || printf '%s\t%s\t%s\n' "${@:1:3}" >>"$OUT/rows.tsv"
}

run_row() {  # as row
    local row=$1 folder upstream seed task complete=yes scratch
    scratch=$CACHE/reproduce/run$(realpath "$OUT" | tr / .).${SEEDS// /.}/$row  # of this run alone
    for seed in $SEEDS; do
        folder=$OUT/$row/seed-$seed upstream=$5
        if [ "$4" = train ]; then
            upstream=$folder/student.pt
            part "$row/seed-$seed" "${distil[@]}" --teachers "${@:5}" --seed "$seed" \
                --out "$folder" ${CACHE:+--cache "$scratch"} || { complete=; continue; }
        fi
        for task in $TASKS; do
            evaluate "$task" "$row/seed-$seed/$task" --upstream "$upstream" --seed "$seed" \
                ${CACHE:+--cache "$scratch"} || complete=
        done
    done
    [[ -z $CACHE || -z $complete ]] || rm -rf "$scratch"
    return 0
}

label() {  # label NAME: prints stdin, with NAME before each line that is not a command
    local line
    ignore_signals
    while IFS= read -r line || [ -n "$line" ]; do
        if ((JOBS > 1)) && [[ -n $line && ! ${line#"$prefix"} =~ ^(python|torchrun)\  ]]; then
            line="$1: $line"
        fi
        printf '%s\n' "$line" 2>/dev/null
    done
    return 0
}

start_row() {  # in the background
    (stop_on_signals; eval "run_row ${arguments[$1]}") | label "$1" &
    ((running += 1))
}

end_row() {  # waits for one of the running rows
    local code
    wait -n
    code=$?
    ((running -= 1))
    [[ $code =~ $signals ]] && stop $code
    ((code == 0)) || echo "a row" >>"$failed"    # killed, or a bug of this script
    table
}

stop_on_signals
mkdir -p "$OUT/logs" && touch "$OUT/rows.tsv" || exit 2
IFS=, read -ra paths <<<"$TEACHERS"
IFS=, read -ra names <<<"$NAMES"
lists='import sys, aggregate, teachers
print(*aggregate.AGGREGATIONS)
print(*teachers.short_names(sys.argv[1:]), sep="\n")'
lists=$(python -c "$lists" "${paths[@]}") || exit 2
{ read -r aggregations; mapfile -t folders; } <<<"$lists"
numbers=(no one two three four five)
n=${#paths[@]} count=${numbers[n]-$n}
((${#names[@]} == n)) || refuse "NAMES must have one name per teacher of TEACHERS"
row fbank baselines "filter banks" upstream fbank
row untrained baselines "before distillation" train "${paths[0]}" --steps 0
for ((i = 0; i < n; i++)); do
    row "teacher-${folders[i]}" teachers "teacher: ${names[i]}" upstream "${paths[i]}"
done
for ((i = 0; i < n; i++)); do
    row "${folders[i]}" "students of one teacher" "${names[i]}'s student" train "${paths[i]}"
done
for ((i = 0; i < n; i++)); do
    for ((j = i + 1; j < n; j++)); do
        if [ -z "$PAIRS" ] || ((n == 2)); then continue; fi
        row "${folders[i]}+${folders[j]}" "students of two teachers" \
            "average of ${names[i]} and ${names[j]}" train "${paths[i]},${paths[j]}"
    done
done
group="students of $count teachers"
row avg "$group" "average of $count" train "$TEACHERS"
row concat "$group" "concatenation of $count" train "$TEACHERS" --agg concat
row none "$group" "separate heads of $count" train "$TEACHERS" --agg none
row avg-one-head "$group" "average, one head" train "$TEACHERS" --heads "${HEADS##*,}"
for agg in $aggregations; do    # those that a user has added to aggregate.py
    [[ $agg =~ ^(avg|concat|none)$ ]] ||
        row "$agg" "$group" "$agg of $count" train "$TEACHERS" --agg "$agg"
done

read -rd '' -a rows <<<"$ROWS"
((${#rows[@]})) || rows=("${all_rows[@]}")
for row in "${rows[@]}"; do
    [[ -n ${arguments[$row]-} ]] || refuse "ROWS: no row $row; there are ${all_rows[*]}"
done
for row in "${rows[@]}"; do
    ((running < JOBS)) || end_row
    start_row "$row"
done
while ((running)); do end_row; done

# The table is printed already.
table --picture "$OUT/results.svg" --layers "$OUT/layers.svg" >/dev/null || echo report >>"$failed"
if [ -s "$failed" ]; then
    failed_parts=$(paste -sd ' ' "$failed")
    echo "failed: $failed_parts; logs are in $OUT/logs; the same command tries them again" >&2
    exit 1
fi
echo "the table: $OUT/results.md; pictures of scores and weights: $OUT/results.svg, $OUT/layers.svg"
