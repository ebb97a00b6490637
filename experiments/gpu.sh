#!/usr/bin/env bash
# All experiments for a GPU that need no TensorFlow, in one call of some minutes. Not yet run.
#
#     bash experiments/gpu.sh cifar10.tar.gz results/
#
# The accuracy of the default run in float32 and bfloat16 (3 seeds each), whether --deterministic
# gives the same bits twice, the step's time by number of devices, and that of each layout.
set -uo pipefail
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
decoded=$(mktemp -d)
trap 'rm -rf "$decoded"' EXIT
common=(--data "$data" --data-dir "$decoded" --input device)

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$out/gpu.txt"
python3 experiments/scaling.py --output "$out/scaling_gpu.json"
for dtype in float32 bfloat16; do
    python3 experiments/accuracy.py --seeds 3 --output "$out/accuracy_cnn_gpu_$dtype.json" \
        --workdirs "$out/runs" "${common[@]}" --dtype "$dtype"
done
for run in 1 2; do
    python3 -m cifar_jax.train "${common[@]}" --epochs 2 --deterministic --workdir "$out/runs/same$run"
done
grep -h params_sha256 "$out"/runs/same?/report.json > "$out/deterministic.txt"
python3 experiments/nhwc_vs_nchw.py --quick --output "$out/nhwc_vs_nchw_gpu.json"
rm -rf "$out"/runs/*/checkpoints
