#!/usr/bin/env bash
# The speedrun on a GPU, all of it in one call:
#
#     bash experiments/speedrun.sh cifar10.tar.gz results/ [airbench94_muon.py]
#
# 200 runs, and where the time of one goes; then, if it is given, 10 runs of the author's own script
# (from https://github.com/KellerJordan/cifar10-airbench; it needs torch and torchvision). That took
# ten minutes on an H100, mostly compiling. Then whether the GPU's steps are the CPU's, and last what
# each choice gains: nine programs to compile; neither has been run in full on a GPU. All is stored
# as soon as it is measured, and kept if the rest is cut off. Called again with the same folder, it
# goes on with the parts that have no file there yet.
set -euo pipefail
usage="usage: bash experiments/speedrun.sh DATA FOLDER [airbench94_muon.py]"
data=$(realpath "${1:?$usage}")
mkdir -p "${2:?$usage}"
out=$(realpath "$2")
beside=()
[ $# -lt 3 ] || beside=(--beside "$(realpath "$3")" --beside-runs 10)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export JAX_PLATFORMS=cuda,cpu # no GPU is an error
# The author's script is compiled with convolutions and products by cuDNN and cuBLAS alone: trying
# Triton's too would take longer than everything else.
export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=ATEN TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN
decoded=$(mktemp -d)
trap 'rm -rf "$decoded"' EXIT

status=0
[ -e "$out/speedrun.json" ] ||
    python3 experiments/speedrun.py --runs 200 --data "$data" --data-dir "$decoded" \
        "${beside[@]}" --output "$out/speedrun.json" || status=$?
# Goes on if only the author's script failed, but not after wrong options.
[ $status != 2 ] && [ -e "$out/speedrun.json" ] || exit $status
for part in check gains; do
    [ -e "$out/speedrun_$part.json" ] ||
        python3 "experiments/speedrun_$part.py" --output "$out/speedrun_$part.json" || status=$?
done
exit $status
