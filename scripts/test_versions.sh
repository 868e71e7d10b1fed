#!/usr/bin/env bash
# A part of the suite with the oldest and the newest supported websockets and torch, each in a temporary environment:
#   bash scripts/test_versions.sh [websockets-oldest|websockets-newest|torch-oldest|torch-newest]...
# Without arguments: all four. BASE=PYTHON names a Python whose packages are used for what a case does not pin, which
# saves installing PyTorch for the cases of websockets; PYTHON=python3.12 the Python to make environments with.
set -euo pipefail
cd "$(dirname "$0")/.."

TESTS=(tests/serde tests/test_light_install.py tests/workers/test_websocket.py tests/workers/test_websocket_frames.py
    tests/workers/test_server.py tests/workers/test_behaviour.py tests/pointers/test_pointers.py tests/fl/test_rounds.py)
TORCH_TESTS=("${TESTS[@]}" tests/plans/test_tracer.py tests/plans/test_training.py tests/plans/test_graph.py
    tests/plans/test_plan.py tests/plans/test_gradients.py tests/plans/test_analysis.py)

# What the oldest torch does otherwise: `torch.autograd.backward([...])` and a checkpointed module without reentry cannot
# be recorded there (a TraceError says so), and a dimension that is a string is a RuntimeError.
OLDEST_DIFFERS=(--deselect tests/plans/test_gradients.py::test_two_backward_passes_accumulate
    --deselect tests/plans/test_gradients.py::test_recurrent_attention_and_checkpointed_modules
    --deselect "tests/pointers/test_pointers.py::test_shape_and_dtype_mistakes_are_raised_where_they_are_made")

# What pyproject.toml names as the oldest, and the torchvision that belongs to that torch.
oldest() { sed -n "s/^ *\"$1>=\([0-9.]*\).*/\1/p" pyproject.toml | head -1; }
declare -A MATCHING=([2.6]=0.21)

failed=()
for case in "${@:-websockets-oldest websockets-newest torch-oldest torch-newest}"; do
    for name in $case; do
        tests=("${TESTS[@]}")
        case $name in
        websockets-oldest) pins=("websockets==$(oldest websockets).*") ;;
        websockets-newest) pins=("websockets") ;;
        torch-oldest)
            torch=$(oldest torch)
            pins=("torch==$torch.*" "torchvision==${MATCHING[$torch]}.*")
            tests=("${TORCH_TESTS[@]}" "${OLDEST_DIFFERS[@]}")
            ;;
        torch-newest) pins=("torch" "torchvision") tests=("${TORCH_TESTS[@]}") ;;
        *)
            echo "test_versions.sh: no case $name" >&2
            exit 2
            ;;
        esac
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        echo "== $name: ${pins[*]}"
        "${PYTHON:-python3}" -m venv "$folder"
        pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet --upgrade)
        if [ -n "${BASE:-}" ]; then
            # Packages of BASE are found after those of the environment itself.
            "$BASE" -c 'import site; print(site.getsitepackages()[0])' >"$(echo "$folder"/lib/python*/site-packages)/base.pth"
            "${pip[@]}" "${pins[@]}"
        else
            "${pip[@]}" "${pins[@]}" --editable '.[dev]'
        fi
        "$folder/bin/python" -c 'import torch, websockets; print("torch", torch.__version__, "websockets", websockets.__version__)'
        PYTHONPATH=$PWD "$folder/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}" || failed+=("$name")
        rm -rf "$folder"
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "test_versions.sh: failed with ${failed[*]}" >&2
    exit 1
fi
