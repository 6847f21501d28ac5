#!/usr/bin/env bash
# What a GPU takes for a model of 7 billion made-up weights, and what it takes of a machine: the rows of docs/benchmarks.md, "On a GPU".
#
#     benches/gpu/run.sh QCQA MADE_UP DIRECTORY
#
# QCQA is the binary, built with the feature `cuda`; MADE_UP that of examples/made_up.rs; 45 GB are written to DIRECTORY. Where cargo and
# the toolkit are, the tests of the GPU come first.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -eq 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
qcqa=$(realpath "$1") made_up=$(realpath "$2") work=$3
text=tests/data/novels-1m/calibration.txt
if command -v cargo > /dev/null && command -v nvcc > /dev/null; then
  cargo test --release --features cuda --test runtime_device
fi
mkdir -p "$work"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
# Seconds, and the most memory of card and process while a command ran.
measured() {
  local name=$1 log=$work/$1.log began=$SECONDS most=0 used
  shift
  "$@" > "$log" 2>&1 &
  local job=$! peak=0
  while kill -0 "$job" 2> /dev/null; do
    used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | head -n 1)
    [ "$used" -gt "$most" ] && most=$used
    used=$(awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$job/status" 2> /dev/null || echo 0)
    [ "${used:-0}" -gt "$peak" ] && peak=$used
    sleep 0.5
  done
  wait "$job" || { tail -n 5 "$log"; return 1; }
  printf '| %s | %s s | %s MiB | %s MiB |\n' "$name" $((SECONDS - began)) "$most" "$peak"
}
[ -d "$work/source" ] || "$made_up" "$work/source" llama-2-7b
printf '| | time | card | process |\n|---|---|---|---|\n'
measured compress "$qcqa" compress "$work/source" --kv 0.5 --target stock --calibration $text --calibration-windows 128 --refit output \
  --device cuda --out "$work/half" --force
for dtype in f32 bf16; do
  measured "distill-$dtype" "$qcqa" distill "$work/half" --source "$work/source" --calibration $text --for 90s --device cuda \
    --dtype $dtype --out "$work/distilled" --force
  grep 'tokens a second' "$work/distill-$dtype.log"
done
