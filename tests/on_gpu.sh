#!/usr/bin/env bash
# Everything that needs a GPU, in at most 30 minutes: tests, then the time of a step of train.py.
#
#     bash tests/on_gpu.sh [OUT]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1-$(mktemp -d)}
mkdir -p "$out"
code=0
timeout 900 python -m pytest -q tests/test_gpu.py tests/test_cuda.py \
    tests/test_train.py::test_a_gpu_gives_the_losses_of_the_cpu -rfE | tee "$out/tests.log" || code=1
batch=$(seq -s " " 12 0.125 14.875) # 24 utterances, train.py's batch
for flags in --cache --compile "--precision fp32"; do
    echo "bench.py $flags" | tee -a "$out/bench.log"
    # shellcheck disable=SC2086
    timeout 300 python bench.py --seconds $batch $flags 2>&1 | tee -a "$out/bench.log" || code=1
done
exit $code
