#!/usr/bin/env bash
# What one GPU shows in ten minutes: step time against its floor, the tests marked `gpu`, and arms of starts.yaml, several
# at a time, for the rest of the time. A step that fails does not keep the next from running.
#
#   benchmarks/real/gpu.sh TEACHER DATA OUT [MINUTES]
#
#   TEACHER  folder or Hub id (benchmarks.real.teacher)
#   DATA     folder of corpora and held-out texts (benchmarks.real.corpora)
#   OUT      folder for the results: device.txt, step-time.json, tests.txt, results/*.json, report.md, status.txt
#   MINUTES  in all; default 10
#
# PYTHON names the interpreter, in whose environment the package and its test extra are installed. PROCESSES is the number
# of arms at a time (default 8): small models leave most of a GPU idle. DEVICE=cpu checks the script itself on a machine
# without a GPU, with a small step time and the table of arms that EXPERIMENTS names.
set -uo pipefail

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
teacher=$1 data=$2 out=$3 minutes=${4:-10}
python=${PYTHON:-python3} device=${DEVICE:-cuda}
begun=$(date +%s)
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
data=$(cd "$data" && pwd) || exit 2
if [ -d "$teacher" ]; then teacher=$(cd "$teacher" && pwd); fi
cd "$(dirname "$0")/../.." || exit 2
root=$PWD
export PYTHONPATH=$root/src:$root/tests TOKENIZERS_PARALLELISM=false
: > "$out/status.txt"

left() { # seconds until the end, less those given
    local seconds=$((minutes * 60 - $(date +%s) + begun - ${1:-0}))
    echo $((seconds > 1 ? seconds : 1))
}

step() { # name, seconds at most, command
    local name=$1 seconds=$2
    shift 2
    timeout --signal=TERM --kill-after=20 "$seconds" "$@"
    local status=$?
    echo "$name: exit status $status after $(($(date +%s) - begun)) s" | tee -a "$out/status.txt"
}

"$python" -c "import torch; d = '$device'; print(torch.cuda.get_device_name() if d == 'cuda' else d, torch.__version__)" \
    | tee "$out/device.txt"

if [ "$device" = cpu ]; then
    timing=(--shape narrow --vocab 512 --tokens 128 --length 64 --dtype float32 --device cpu)
    export MINITRON_GPU_TESTS=cpu
else
    timing=(--shape wide --vocab 128256 --tokens 8192 --length 2048 --dtype bfloat16 --device cuda)
fi
(cd benchmarks && step step-time 90 "$python" distillation.py "${timing[@]}" --quick --output "$out/step-time.json")
mapfile -t files < <(grep -l "mark.gpu" tests/test_*.py)
step tests 120 "$python" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}" > "$out/tests.txt"
tail -n 3 "$out/tests.txt"
table=${EXPERIMENTS:-benchmarks/real/starts.yaml}
arms() { # the share of one process: what no other has begun
    "$python" -m benchmarks.real.run --teacher "$teacher" --data "$data" --work "$out/work/$1" --results "$out/results" \
        --corpus written=benchmarks/real/written.jsonl --experiments "$table" --drop-students \
        --minutes "$("$python" -c "print($(left 60) / 60)")" > "$out/arms-$1.txt" 2>&1
}
export OMP_NUM_THREADS=1
pids=()
for number in $(seq "${PROCESSES:-8}"); do
    arms "$number" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
echo "arms: exit status $status after $(($(date +%s) - begun)) s" | tee -a "$out/status.txt"
step report 60 "$python" -m benchmarks.real.report --results "$out/results" --experiments "$table" > "$out/report.md"
tail -n 6 "$out/report.md"
! grep -v "exit status 0 " "$out/status.txt"
