#!/usr/bin/env bash
# The tables of docs/caches.md, in Markdown on standard output: every system of the field on one model, alone and together.
#     benches/caches.sh QCQA MODEL TEXT "CALIBRATION…" [CONTEXT [WINDOWS]]
set -euo pipefail
qcqa=$1 model=$2 text=$3 context=${5:-512} windows=${6:-8}
read -ra calibration <<< "$4"
learn=(--calibration "${calibration[@]}" --calibration-windows 64)
read=(--text "$text" --context "$context" --windows "$windows")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
half=$((context / 2)) quarter=$((context / 4))

printf '## %s, windows of %s tokens\n\n### Ways to share heads, at half of them\n\n' "$(basename "$model")" "$context"
# MQA and cla-low-rank have caches of their own sizes.
"$qcqa" compare "$model" --kv 0.5 --method gqa,mqa,key-norm,dgqa,pgqa,qcqa-ec,qcqa-ac,cla,cla-low-rank,low-rank --refit output \
  "${learn[@]}" "${read[@]}"

printf '\n### What is kept of tokens and bits, alone and under plans\n\n'
keeps=full:bits=16,full:bits=8,full:bits=4,full:bits=3
keeps+=,window:recent=$((half - 4)),window:recent=$((quarter - 4)),window:recent=$((half - 4)):bits=4
keeps+=,corm:window=64,corm:window=64:threshold=4
keeps+=,headkv:tokens=$half,headkv:tokens=$quarter,headkv-r2:tokens=$half,headkv-r2:tokens=$quarter
keeps+=,qaq,qaq:key_error=0.01:value_error=0.05
"$qcqa" compare "$model" --kv 0.5,0.25 --method low-rank --refit output --cache "$keeps" "${learn[@]}" "${read[@]}"

printf '\n### What is still known of what was said long before\n\n'
keeps=full,full:bits=4,window:recent=$((quarter - 4)),corm:window=64:threshold=4,headkv:tokens=$quarter,headkv-r2:tokens=$quarter,qaq
"$qcqa" eval "$model" --cache "$keeps" --recall "${learn[@]}" "${read[@]}"

printf '\n### The best mixture of a budget, and what spends it on one thing\n'
whole=$("$qcqa" inspect "$model" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["kv_bytes_per_token"])')
for share in 2 4 8; do
  printf '\n'
  "$qcqa" budget "$model" --bytes-per-token $((whole / share)) --context "$context" --windows "$windows" "${learn[@]}" --out "$work/$share"
done
