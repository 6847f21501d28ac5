#!/usr/bin/env bash
# The measured part of docs/caches.md, in Markdown on standard output: every system of the field on some models, alone and together.
#     benches/caches.sh QCQA TEXT "CALIBRATION…" "MODEL[ NAME=VALUE]…"…
# Of each model, unless said: context=512, windows=8 of TEXT, shares=0.5,0.25 of the heads that plans keep, fit=128 calibration windows, texts=all of the
# CALIBRATION texts or the first so many, tables=sharing,caches,recall,budgets, device= where it runs, of a binary that has a choice.
# ABREAST tables are made at a time, 1 unless said; they are printed in their order.
set -euo pipefail
qcqa=$1 text=$2
read -ra calibration <<< "$3"
shift 3

# How heads are shared.
sharing() {
  printf '\n### Ways to share heads\n\n'
  "$qcqa" compare "$model" --kv "$shares" --refit output \
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

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
made=() title=
for of in "$@"; do
  read -r model settings <<< "$of"
  context=512 windows=8 shares=0.5,0.25 fit=128 texts=${#calibration[@]} tables=sharing,caches,recall,budgets device=
  for setting in $settings; do
    case ${setting%%=*} in
      context | windows | shares | fit | texts | tables | device) printf -v "${setting%%=*}" %s "${setting#*=}" ;;
      *) echo "no setting $setting" >&2 && exit 2 ;;
    esac
  done
  learn=(--calibration "${calibration[@]:0:texts}" --calibration-windows "$fit" ${device:+--device "$device"})
  reads=(--text "$text" --context "$context" --windows "$windows")
  for table in ${tables//,/ }; do
    case $table in
      sharing | caches | recall | budgets) ;;
      *) echo "no table $table" >&2 && exit 2 ;;
    esac
    while [ "$(jobs -rp | wc -l)" -ge "${ABREAST:-1}" ]; do wait -n; done
    file=$work/${#made[@]}
    printf -v heading '\n## %s, %s windows of %s tokens\n' "$(basename "$model")" "$windows" "$context"
    if [ "$heading" != "$title" ]; then printf %s "$heading" > "$file"; fi
    title=$heading
    "$table" >> "$file" &
    made+=("$!" "$file")
  done
done
for ((i = 0; i < ${#made[@]}; i += 2)); do
  wait "${made[i]}"
  cat "${made[i + 1]}"
done
