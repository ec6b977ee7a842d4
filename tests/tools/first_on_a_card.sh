#!/usr/bin/env bash
# The first minutes on a card: is everything right there, and how fast is it?
#
#     bash tests/tools/first_on_a_card.sh [SECONDS]
#
# It takes nine minutes at most, or SECONDS. Each stage has its own limit, so the later ones are reached whatever the
# earlier ones do. All that is said is also in $OUT (/tmp/first_on_a_card), speed.json after each row. Without a card:
#
#     PYTHON="python tests/tools/emulated_gpu/emulator.py" SIZE=tiny bash tests/tools/first_on_a_card.sh 3000
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:=/tmp/first_on_a_card}" "${PYTHON:=python}" "${SIZE:=base}"
export NANOLLM_DEVICE=gpu PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
limit=${1:-540}

stage() {       # NAME SECONDS COMMAND...
    local name=$1 most=$2 left=$((limit - SECONDS))
    shift 2
    [ "$left" -gt "$most" ] || most=$left
    if [ "$most" -lt 15 ]; then echo "=== $name: no time is left"; return 1; fi
    printf '\n=== %s: from second %d, for at most %d\n' "$name" "$SECONDS" "$most"
    timeout -k 5 "$most" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    echo "=== $name: exit code $code, at second $SECONDS"
    return "$code"
}

tests() {       # NAME SECONDS WORDS...: -v names the tests that failed even if the time is over; no plugins but xdist
    local name=$1 most=$2
    shift 2
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 stage "$name" "$most" $PYTHON -m pytest -v -p no:cacheprovider --tb=short \
        --maxfail=40 "$@" > "$OUT/shown"
    grep -aE "FAILED|^ERROR|^E  |passed|failed|===" "$OUT/shown" | cut -c1-200 | tail -60
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv | tee "$OUT/card.txt"
first="$PYTHON tests/tools/first_on_a_card.py"
stage device 60 $first device "$SIZE" || exit 1         # a kernel, products, memory
tests equal 120 tests/test_gpu_path.py                  # everything gives what NumPy gives
stage steps 100 $first steps "$SIZE"                    # a training step: memory, host time, device time
stage speed 150 $PYTHON benchmarks/speed.py --device gpu --config "$SIZE" --dtype bfloat16 --compile --rounds 3 \
    --steps 10 --megabytes 0.05 --json "$OUT/speed.json"
parallel=$($PYTHON -c "import xdist" 2> "$OUT/xdist" && echo "-p xdist.plugin -n ${WORKERS:-8}")
tests computing 300 $parallel tests/test_autograd.py tests/test_nanollm.py tests/test_precision.py \
    tests/test_train.py tests/test_quantized.py tests/test_images.py
echo "=== done at second $SECONDS; results in $OUT"
