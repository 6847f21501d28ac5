#!/usr/bin/env bash
# A table of docs/finetuning.md, in Markdown on standard output: what sharing heads costs a model before and after the same
# distillation, by method and budget.
#     benches/finetuning/run.sh QCQA MODEL EVALUATION "CALIBRATION…" [NAME=VALUE]…
# Unless said: methods=gqa,qcqa-ec,qcqa-ac,low-rank, shares=0.5,0.25,0.125 of the cache, tokens=1M, seeds=0,1,2, fit=2048 calibration windows,
# windows=96 of EVALUATION, gpus=0 of this machine, and python= one with what recipes/heal needs, which trains MODEL itself by the loss on
# the next token as long, for comparison. ABREAST runs are made at a time, 1 unless said.
set -euo pipefail
cd "$(dirname "$0")/../.."
export QCQA=$1 MODEL=$2 EVALUATION=$3
read -ra calibration <<< "$4"
shift 4
methods=gqa,qcqa-ec,qcqa-ac,low-rank shares=0.5,0.25,0.125 tokens=1M seeds=0,1,2 fit=2048 windows=96 gpus=0 python=
for setting in "$@"; do
  case ${setting%%=*} in
    methods | shares | tokens | seeds | fit | windows | gpus | python) printf -v "${setting%%=*}" %s "${setting#*=}" ;;
    *) echo "no setting $setting" >&2 && exit 2 ;;
  esac
done
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export WORK tokens windows gpus python
LEARN="--calibration ${calibration[*]} --calibration-windows $fit" && export LEARN

# One of these runs: compress METHOD SHARE, distill METHOD SHARE SEED, train SEED. Its figures are what `eval` says of its model.
run() {
  set -euo pipefail
  local device=() visible=() learn what=$1 out
  read -ra learn <<< "$LEARN"
  [ "$gpus" -eq 0 ] || device=(--device "cuda:$((SLOT % gpus))") visible=(env "CUDA_VISIBLE_DEVICES=$((SLOT % gpus))")
  out=$WORK/$(IFS=_ && echo "$*")
  case $what in
    compress)
      "$QCQA" compress "$MODEL" --kv "$3" --method "$2" --target expanded "${learn[@]}" "${device[@]}" --out "$out" --json > "$out.plan"
      ;;
    distill)
      "$QCQA" distill "$WORK/compress_$2_$3" --source "$MODEL" --for "$tokens" --seed "$4" "${learn[@]}" "${device[@]}" --out "$out"
      ;;
    train)
      "${visible[@]}" "$python" recipes/heal/heal.py "$MODEL" "$WORK/whole" --kl 0 --loss 1 --tokens "$tokens" \
        --seed "$2" "${learn[@]}" --out "$out"
      ;;
  esac >> "$out.log" 2>&1 || { echo "$*: $(tail -n 3 "$out.log")" >&2 && return 1; }
  "$QCQA" eval "$out" --source "$MODEL" --text "$EVALUATION" --windows "$windows" "${device[@]}" --json > "$out.json"
  [ "$what" = compress ] || rm -r "$out"
}
export -f run
abreast() { xargs -P "${ABREAST:-1}" -L 1 --process-slot-var=SLOT bash -c 'run "$@"' run; }

compress() { for method in ${methods//,/ }; do for share in ${shares//,/ }; do echo "compress $method $share"; done; done; }
distill() { for seed in ${seeds//,/ }; do compress | sed "s/^compress/distill/; s/$/ $seed/"; done; }
train() { for seed in ${seeds//,/ }; do echo "train $seed"; done; }
"$QCQA" eval "$MODEL" --text "$EVALUATION" --windows "$windows" --json > "$WORK/source.json"
compress | abreast
if [ -n "$python" ]; then
  "$QCQA" compress "$MODEL" --method gqa --kv 1 --target expanded --out "$WORK/whole" > /dev/null
  { distill && train; } | abreast
else
  distill | abreast
fi
python3 benches/finetuning/table.py "$WORK" "$methods" "$shares" "$tokens"
