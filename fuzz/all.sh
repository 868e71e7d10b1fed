#!/usr/bin/env bash
# usage: fuzz/all.sh [SEED]   (from the repository, in its environment): everything, for a new torch or a changed table
set -u
cd "$(dirname "$0")/.."
seed=${1:-$(date +%Y%m%d)}
python -c 'import torch; print("torch", torch.__version__)'
found=0
python -m fuzz.ops --calls 500000 --seed "$seed" || found=1
python -m fuzz.rows --plans 20000 --seed "$seed" || found=1
for part in 0 1 2 3; do # 10^6 frames, in pieces
    python -m fuzz.frames --frames 250000 --seed "$seed" --first "${part}000000" || found=1
done
python -m fuzz.texts --tries 200000 --seed "$seed" || found=1
python -m fuzz.policies --tries 50000 --seed "$seed" || found=1
exit $found
