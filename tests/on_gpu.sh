#!/usr/bin/env bash
# Everything that needs a GPU, one command, under 25 minutes; one table at the end.
#
#     bash tests/on_gpu.sh [OUT]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1-$(mktemp -d)}
mkdir -p "$out"
timeout 900 python -m pytest -q tests/test_gpu.py tests/test_cuda.py -rA >"$out/tests.log" 2>&1
bench() { timeout 240 python bench.py --json "${@:2}" >"$out/$1.log" 2>&1 || echo "bench.py ${*:2}: failed, see $out/$1.log"; }
bench plain --steps 5 --cache --profile "$out/trace.json"
bench compiled --steps 5 --compile
bench peer-fp32 --steps 3 --peer
bench peer-bf16 --steps 3 --peer --peer-precision bf16
timeout 120 python - >"$out/states.log" 2>&1 <<'PYTHON'
# A probe's batch of 32 utterances of 12 s: is it quicker to copy its kept states to the GPU or to compute them again?
import json
import torch
from bench import timed
from encoder import EncoderConfig, SpeechEncoder
device = torch.device("cuda")
encoder, waveforms = SpeechEncoder(EncoderConfig()).eval().to(device), torch.randn(32, 192000, device=device)
def compute():
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return torch.stack([state.bfloat16() for state in encoder(waveforms)])
kept = compute().cpu().pin_memory()
figures = {}
for name, act in (("compute", compute), ("copy", lambda: kept.to(device, non_blocking=True))):
    figures[name] = min(timed(act, device)[0] for _ in range(5))
print(json.dumps(figures))
PYTHON
python - "$out" <<'PYTHON'
import json, os, re, sys
out, rows = sys.argv[1], []
with open(f"{out}/tests.log") as file:
    log = file.read()
for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) .*?::(\S+)", log, re.M):
    if "test_gpu" in log and outcome != "PASSED":
        rows.append((name, outcome.lower()))
rows.append(("tests", log.strip().splitlines()[-1].strip("= ") if log.strip() else "none ran"))
figures = {}
for name in ("plain", "compiled", "peer-fp32", "peer-bf16"):
    try:
        with open(f"{out}/{name}.log") as file:
            figures[name] = json.loads(file.read().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        rows.append((f"bench {name}", "failed"))
for name, f in figures.items():
    rows.append((f"{name}: share of the matrix product", f"{f['share_of_limit']:.1%} (goal 50%)"))
    rows.append((f"{name}: speech a second", f"{f['audio_per_second']:,.0f} s"))
    rows.append((f"{name}: 200,000 steps", f"{f['seconds_per_step'] * 200_000 / 3600:,.0f} hours"))
    rows.append((f"{name}: peak memory", f"{f['peak_memory_bytes'] / 1e9:.1f} GB"))
    if "ratio_to_peer" in f:
        rows.append((f"{name}: times as fast as transformers", f"{f['ratio_to_peer']:.2f} (goal {6 if 'fp32' in name else 1.5})"))
    if "kept_ratio" in f:
        rows.append(("a step with kept targets", f"{f['kept_ratio']:.2f} times as fast"))
        rows += [(f"  time in {part}", f"{share:.1%}") for part, share in f["shares"].items()]
try:
    with open(f"{out}/states.log") as file:
        found = json.loads(file.read().strip().splitlines()[-1])
    rows.append(("a probe's batch of states, copied; computed", f"{found['copy']:.3f} s; {found['compute']:.3f} s"))
except (OSError, ValueError, IndexError, KeyError):
    rows.append(("a probe's batch of states", "failed, see states.log"))
print(*(f"{name:45} {value}" for name, value in rows), sep="\n")
print(f"logs, and a trace of one step for chrome://tracing: {os.path.abspath(out)}")
PYTHON
