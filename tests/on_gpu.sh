#!/usr/bin/env bash
# What needs a GPU, the most telling part first, in at most 10 minutes. Logs are in OUT.
#
#     bash tests/on_gpu.sh [OUT]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1-$(mktemp -d)}
mkdir -p "$out"
code=0

part() {  # part NAME SECONDS COMMAND...: runs COMMAND; its output is in OUT/NAME.log
    echo "== $1"
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || { code=1; echo "$1 failed" | tee -a "$out/failed"; }
}

batch=$(seq -s " " 12 0.125 14.875)  # 24 utterances, train.py's batch
test() { part "$1" "$2" python -m pytest -v -n 0 "${@:3}"; }
bench() { part "$1" "$2" python bench.py --seconds $batch --steps 3 "${@:3}"; }
test losses 90 tests/test_train.py::test_a_gpu_gives_the_losses_of_the_cpu
bench bench 90 --cache
test states 90 tests/test_gpu.py -k "states or bf16"
test training 150 tests/test_gpu.py -k "not states and not bf16"
bench fp32 60 --precision fp32
bench compile 120 --compile
exit $code
