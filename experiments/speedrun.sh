#!/usr/bin/env bash
# The speedrun on a GPU, all of it in one call:
#
#     bash experiments/speedrun.sh cifar10.tar.gz results/ [airbench94_muon.py]
#
# 200 runs; then 10 of the author's own script if it is given (from
# https://github.com/KellerJordan/cifar10-airbench; it needs torch and torchvision): that took ten
# minutes on an H100, most of them compiling. Then what each choice gives, which compiles nine
# programs, and has not been run whole on a GPU yet. Each run and each choice is stored as it comes:
# what is there by then is kept if it is cut off.
set -euo pipefail
usage="usage: bash experiments/speedrun.sh DATA FOLDER [airbench94_muon.py]"
data=$(realpath "${1:?$usage}")
mkdir -p "${2:?$usage}"
out=$(realpath "$2")
beside=()
[ $# -lt 3 ] || beside=(--beside "$(realpath "$3")" --beside-runs 10)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
# His script is compiled with convolutions and products by cuDNN and cuBLAS: to try Triton's too takes
# longer than all else.
export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=ATEN TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN
decoded=$(mktemp -d)
trap 'rm -rf "$decoded"' EXIT

status=0
python3 experiments/speedrun.py --runs 200 --data "$data" --data-dir "$decoded" "${beside[@]}" \
    --output "$out/speedrun.json" || status=$?
# Not after wrong options; but if it was the author's script that failed, or the profiler.
[ $status != 2 ] && [ -e "$out/speedrun.json" ] || exit $status
python3 experiments/speedrun_gains.py --output "$out/speedrun_gains.json"
exit $status
