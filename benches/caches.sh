#!/usr/bin/env bash
# The measured part of docs/caches.md, in Markdown on standard output: every system of the field on some models, alone and together.
#     benches/caches.sh QCQA TEXT "CALIBRATION…" MODEL[:CONTEXT[:WINDOWS[:SHARES]]]…
# SHARES of the heads, 0.5,0.25 unless said, are what plans keep. ONLY=sharing|caches|recall|budgets makes that table alone, WINDOWS_THAT_FIT is 128
# unless said, DEVICE where models run, of a binary that has it.
set -euo pipefail
qcqa=$1 text=$2
read -ra calibration <<< "$3"
shift 3
learn=(--calibration "${calibration[@]}" --calibration-windows "${WINDOWS_THAT_FIT:-128}" ${DEVICE:+--device "$DEVICE"})

wanted() { [ "${ONLY:-$1}" = "$1" ]; }

# How heads are shared, at the first of the shares. MQA and layers in pairs have caches of their own sizes.
sharing() {
  printf '\n### Ways to share heads\n\n'
  "$qcqa" compare "$model" --kv "${shares%%,*}" --refit output \
    --method gqa,mqa,key-norm,dgqa,pgqa,qcqa-ec,qcqa-ac,cla,cla-low-rank,low-rank "${learn[@]}" "${reads[@]}"
}

caches() {
  local half=$((context / 2)) quarter=$((context / 4)) keeps
  keeps=full:bits=16,full:bits=8,full:bits=4,full:bits=3
  keeps+=,window:recent=$((half - 4)),window:recent=$((quarter - 4)),window:recent=$((half - 4)):bits=4
  keeps+=,corm:window=64,corm:window=64:threshold=4
  keeps+=,headkv:tokens=$half,headkv:tokens=$quarter,headkv-r2:tokens=$half,headkv-r2:tokens=$quarter
  keeps+=,headkv-r2:tokens=$half:bits=4,qaq,qaq:key_error=0.01:value_error=0.05
  printf '\n### What is kept of tokens and bits, alone and under plans\n\n'
  "$qcqa" compare "$model" --kv "$shares" --method low-rank --refit output --cache "$keeps" "${learn[@]}" "${reads[@]}"
}

recall() {
  local quarter=$((context / 4)) keeps
  keeps=full,full:bits=4,window:recent=$((quarter - 4)),corm:window=64:threshold=4
  keeps+=,headkv:tokens=$quarter,headkv-r2:tokens=$quarter,qaq
  printf '\n### What is still known of what was said long before\n\n'
  "$qcqa" eval "$model" --cache "$keeps" --recall "${learn[@]}" "${reads[@]}"
}

budgets() {
  local whole
  whole=$("$qcqa" inspect "$model" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["kv_bytes_per_token"])')
  printf '\n### The best mixture of a budget, and what spends it on one thing\n\n'
  "$qcqa" budget "$model" --bytes-per-token $((whole / 2)),$((whole / 4)),$((whole / 8)) --context "$context" --windows "$windows" \
    --kv "$shares" --text "$text" "${learn[@]}"
}

for of in "$@"; do
  IFS=: read -r model context windows shares <<< "$of"
  context=${context:-512} windows=${windows:-8} shares=${shares:-0.5,0.25}
  reads=(--text "$text" --context "$context" --windows "$windows")
  printf '\n## %s, %s windows of %s tokens\n' "$(basename "$model")" "$windows" "$context"
  for table in sharing caches recall budgets; do
    if wanted "$table"; then "$table"; fi
  done
done
