#!/usr/bin/env bash
# The speedrun on a GPU, all of it in one call of some ten minutes:
#
#     bash experiments/speedrun.sh cifar10.tar.gz results/ [airbench94_muon.py]
#
# 200 runs; then 20 of the author's own script if it is given (from
# https://github.com/KellerJordan/cifar10-airbench; it needs torch and torchvision, and compiles for
# minutes); then what each choice gives.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
beside=()
[ $# -lt 3 ] || beside=(--beside "$(realpath "$3")")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

python3 experiments/speedrun.py --runs 200 --data "$data" --data-dir "$out/data" "${beside[@]}" \
    --output "$out/speedrun.json"
rm -rf "$out/data"
python3 experiments/speedrun_gains.py --output "$out/speedrun_gains.json"
