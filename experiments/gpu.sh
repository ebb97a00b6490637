#!/usr/bin/env bash
# All experiments for a GPU that need no TensorFlow, in one call of some minutes. Not yet run.
#
#     bash experiments/gpu.sh cifar10.tar.gz results/
#
# The accuracy of the default run in float32 and bfloat16 (3 seeds each), whether a run gives the
# same bits twice, with and without --deterministic, the step's time by number of devices, and that
# of each layout. Goes on where one of them fails, and says so by its exit status.
set -uo pipefail
usage="usage: bash experiments/gpu.sh DATA FOLDER"
data=$(realpath "${1:?$usage}")
mkdir -p "${2:?$usage}"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export JAX_PLATFORMS=cuda,cpu # no GPU is an error
scratch=$(mktemp -d) # the decoded images, and the runs: only their numbers are kept
trap 'rm -rf "$scratch"' EXIT
common=(--data "$data" --data-dir "$scratch/data" --input device)
status=0

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$out/gpu.txt"
python3 experiments/scaling.py --output "$out/scaling_gpu.json" || status=1
for dtype in float32 bfloat16; do
    python3 experiments/accuracy.py --seeds 3 --output "$out/accuracy_cnn_gpu_$dtype.json" \
        --workdirs "$scratch/runs" "${common[@]}" --dtype "$dtype" || status=1
done
for option in --deterministic --no-deterministic; do
    for run in 1 2; do # each compiles for itself: kernels are chosen anew
        JAX_ENABLE_COMPILATION_CACHE=0 python3 -m cifar_jax.train "${common[@]}" --epochs 2 \
            "$option" --workdir "$scratch/runs/$run$option" || status=1
    done
done
(cd "$scratch/runs" && grep params_sha256 ?--*/report.json) > "$out/deterministic.txt" || status=1
python3 experiments/nhwc_vs_nchw.py --quick --output "$out/nhwc_vs_nchw_gpu.json" || status=1
exit $status
