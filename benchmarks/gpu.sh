#!/usr/bin/env bash
# What a GPU does with this project: numerics, then speed, then a training of MINUTES minutes on procedural maps, as one
# section for docs/performance.md.
#
#   benchmarks/gpu.sh                             # writes gpu/gpu.md; about 25 minutes and MINUTES more
#   OUT=/scratch/gpu MINUTES=60 benchmarks/gpu.sh
#   TINY=1 benchmarks/gpu.sh                      # every line of it on a CPU in a minute, figures without meaning
#
# Needs no network. Exits 4 if a fast path computes something else than the plain one; nothing is measured then.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
out=$(realpath -m "${OUT:-gpu}")
work=$out/work
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

if [ -n "${TINY:-}" ]; then
  minutes=${MINUTES:-0.02}
  numerics=(--tiny --device cpu --backend aot_eager)
  maps=(--categories 2 --per_category 12 --test_per_category 4 --size 64)
  step=(--config pretrain_demo --batch 4 --steps 1 --threads 1 --dtype fp32 --train.device cpu --data.workers 0)
  table=(--rounds 1 --without packing --maps "on the device")
  run=(--config pretrain_demo --train.device cpu --train.batch 4 --data.workers 0 --crops.global_size 42
    --crops.local_size 28 --loss.koleo_weight 0 --data.on_device true)
else
  minutes=${MINUTES:-10}
  numerics=(--device cuda)
  maps=(--per_category 320 --test_per_category 40 --size 400)
  step=(--batch 128 --steps 20 --train.device cuda --train.compile true --data.workers "${WORKERS:-12}")
  table=(--rounds "${ROUNDS:-2}")
  run=(--train.device cuda --train.compile true --data.on_device true
    --data.workers "${WORKERS:-12}")
fi

rm -rf "$work"
mkdir -p "$work"
cd "$work"
# What was written before a failure is shown; only a whole section gets its name.
trap 'code=$?; [ "$code" = 0 ] || cat "$out/gpu.md.part" >&2; exit "$code"' EXIT
{
  printf '## On a GPU\n\n`benchmarks/gpu.sh`. '
  "$python" "$here/machine.py"

  printf '\n### Numerics\n\n'
  echo "numerics" >&2
  "$python" "$here/numerics.py" "${numerics[@]}"

  echo "procedural maps" >&2
  "$python" -m dino_depth.cli synth mvtec3d --out "$work/raw" "${maps[@]}" >&2
  "$python" -m dino_depth.cli prep mvtec3d --root "$work/raw" --out "$work/shards" >&2

  echo "speed" >&2
  printf '\n### One optimisation step\n\n`pretrain_step.py --table %s`\n\n' "${step[*]}"
  "$python" "$here/pretrain_step.py" "${step[@]}" --table --shards "$work/shards" "${table[@]}"

  echo "training for $minutes minutes" >&2
  printf '\n### Training for %s minutes\n\n' "$minutes"
  "$python" "$here/timed_training.py" --shards "$work/shards" --out "$work/run" --minutes "$minutes" "${run[@]}"
} >"$out/gpu.md.part"
mv "$out/gpu.md.part" "$out/gpu.md"
echo "$out/gpu.md" >&2
