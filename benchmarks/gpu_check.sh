#!/usr/bin/env bash
# What is to be checked and measured where a GPU is at hand: in the order of its worth, unattended, in 16 minutes.
#
#     benchmarks/gpu_check.sh             # on CUDA
#     benchmarks/gpu_check.sh --small     # the same stages on a CPU, at sizes that say nothing about speed
#
# Every stage has a time limit, longer on a CPU, and may use up what those before it have left over. Where one fails,
# the others go on. Each writes OUT/STAGE.md, .json and .log, and OUT/summary.md has all tables so far. The script ends
# with 1 if a stage has failed. It installs nothing: torch and what setup.py names (extras "train" and "test") must be
# there, the package itself need not be. Set by environment variables:
#
#     OUT=gpu_check            the folder for all of that
#     PYTHON=python3           the interpreter
#     VAR=/path/to/VAR         a checkout of the official VAR code, for the rows "reference"
#     DIFFUSERS_SOURCE=/path   a checkout of diffusers, for its own tests; they want the extra "diffusers_suite", and
#                              are shared by processes where pytest-xdist is installed
#     STAGES="graphs train"    only these stages
#     DEVICE=cpu or SMALL=1    as --small
set -u

[ "${1:-}" = --small ] || [ "${DEVICE:-}" = cpu ] && SMALL=1
mkdir -p "${OUT:=gpu_check}" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

# Sizes: on CUDA VAR's, on a CPU such that seven scales are drawn in a moment; a compiler would take minutes there.
if [ -z "${SMALL:-}" ]; then
    device=${DEVICE:-cuda} dtype=bfloat16 precision=bf16 patience=1
    depth=16 deeper=30 medium=8 large=64 deeper_large=16 slices=64 layers=16 grids=(16 32 64) step_batches=(16 8 2)
    rounds=15 fewer_rounds=5
    model=(--image_size 256) graph_model=(--image_size 256)
    rows=(causal sdd-eager sdd sdd-fused sdd-6 sdd-compiled sdd-6-compiled)
    rows_again=(causal sdd-eager sdd sdd-fused sdd-6)  # compiling for other batches takes a minute each
    graph_rows=(causal sdd sdd-6)
    training=(--max_train_steps 200)
    slicing=(--images_per_slice 1 4 11 32 64 --num_rounds 3)
    suite=tests/diffusers_suite
else
    device=cpu dtype=float32 precision=no patience=5
    depth=1 deeper=2 medium=2 large=3 deeper_large=2 slices=2 layers=1 grids=(1 2 3) step_batches=(1 1 1)
    rounds=1 fewer_rounds=1
    model=(--image_size 128 --vae_channels 32 --codebook_size 1024 --compile_backend eager)
    graph_model=("${model[@]}" --image_size 32)
    rows=(causal sdd-eager sdd sdd-6 sdd-compiled) rows_again=(sdd-eager sdd)
    graph_rows=(sdd)
    training=(--max_train_steps 3 --logging_steps 1 --num_pictures 8 --train_batch_size 4 --num_layers 1
        --num_attention_heads 1)
    slicing=(--image_size 32 --vae_channels 32 --images_per_slice 1 2 --num_rounds 1)
    suite=tests/diffusers_suite/test_scheduling_scale.py
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
fi
reference=()
[ -n "${VAR:-}" ] && reference=(--reference "$VAR")

time_given=0 has_failed=0 table="| stage | what became of it | s | s given |
|---|---|---|---|"

# Whether a stage is wanted.
is_wanted() { [ -z "${STAGES:-}" ] || [[ " $STAGES " == *" $1 "* ]]; }

# A line of the summary, and the summary.
record() {
    table+=$'\n'"| $1 | $2 | $3 | $4 |"
    echo "$1: $2 ($3 s)" >&2
    {
        cat "$OUT/about.md"
        echo "$table"
        for each in "${done[@]}"; do
            printf '\n## %s\n\n' "$each"
            sed -e :a -e '/^\n*$/{$d;N;ba' -e '}' "$OUT/$each.md"  # without empty lines at the end
        done
    } >"$OUT/summary.md"
}

# NAME SECONDS COMMAND...: run a stage. What it writes to the standard output is its table.
stage() {
    local name=$1 given=$(($2 * patience)) started=$SECONDS code outcome=done
    shift 2
    is_wanted "$name" || return
    time_given=$((time_given + given))
    timeout -k 5 $((time_given > SECONDS ? time_given - SECONDS : 1)) "$@" >"$OUT/$name.md" 2>"$OUT/$name.log"
    code=$?
    [ $code -eq 0 ] || has_failed=1 outcome="failed with exit code $code, see $name.log"
    [ $code -ne 124 ] && [ $code -ne 137 ] || outcome="ended at its time limit, see $name.log"
    local seconds=$((SECONDS - started))
    [ -s "$OUT/$name.json" ] || echo "{\"exit_code\": $code, \"seconds\": $seconds}" >"$OUT/$name.json"
    done+=("$name")
    record "$name" "$outcome" "$seconds" "$given"
}

# NAME REASON: a stage that cannot run here.
leave_out() { is_wanted "$1" && record "$1" "left out: $2" 0 0; }

# NAME SECONDS ARGUMENTS...: pytest; the table is its last line.
tests() {
    local name=$1 given=$2
    shift 2
    if ! "$PYTHON" -c "import pytest" 2>/dev/null; then
        leave_out "$name" "pytest is not installed"
        return
    fi
    # 5: there are no such tests.
    local last_line='"$@" 2>&1 | tee -a /dev/stderr | tail -n 1; code=${PIPESTATUS[0]}; exit $((code == 5 ? 0 : code))'
    stage "$name" "$given" bash -c "$last_line" - "$PYTHON" -m pytest -q -W ignore "$@"
}

# NAME SECONDS DEPTH ROUNDS ROWS BATCH_SIZES...: time rows; ROWS is the name of an array.
speed() {
    local name=$1 given=$2 its_depth=$3 its_rounds=$4
    local -n its_rows=$5
    shift 5
    stage "$name" "$given" "$PYTHON" benchmarks/speed.py --device $device --dtype $dtype "${model[@]}" --profile \
        ${reference[@]+"${reference[@]}"} --depth "$its_depth" --batch_size "$@" --num_rounds "$its_rounds" \
        --rows "${its_rows[@]}" --output "$OUT/$name.json"
}

# NAME SECONDS DTYPE ROWS...: whether rows draw the same with and without CUDA graphs.
graphs() {
    local name=$1 given=$2 its_dtype=$3
    shift 3
    stage "$name" "$given" "$PYTHON" benchmarks/graph_check.py --device $device --dtype "$its_dtype" "${graph_model[@]}" \
        --depth $depth --batch_size 1 --rows "$@" --output "$OUT/$name.json"
}

# NAME SECONDS INDEX: what a training step costs at a grid.
training_step() {
    stage "$1" "$2" "$PYTHON" benchmarks/training_step.py --device $device --mixed_precision $precision \
        --num_layers $layers --grid_size "${grids[$3]}" --batch_size "${step_batches[$3]}" \
        --num_rounds $fewer_rounds --output "$OUT/$1.json"
}

done=()
about="import time, torch
from importlib.metadata import version
device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{torch.get_num_threads()} CPU threads'
print(f'{device}, {time.strftime(\"%Y-%m-%d\")}, torch {torch.__version__}, diffusers {version(\"diffusers\")}', end=', ', flush=True)"
{
    timeout 20 "$PYTHON" -c "$about" || printf '(see about.log), '
    echo "srdd $(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/srdd/__init__.py), commit" \
        "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)${SMALL:+; sizes that say nothing about speed}"
    echo
} >"$OUT/about.md" 2>"$OUT/about.log"

# The seconds, and 20 for what is above, add up to 16 minutes.
SECONDS=0
processes=
[ -n "${SMALL:-}" ] || processes=$("$PYTHON" -c "import xdist; print('-n 8')" 2>/dev/null)
graphs graphs 55 float32 "${graph_rows[@]}"
marked=$(grep -rl --include="test_*.py" "mark\.cuda" tests)
if [ -n "$marked" ]; then
    tests tests 70 $processes -m cuda $marked
else
    leave_out tests "no test is marked cuda"
fi
speed speed_batch_1 115 $depth $rounds rows 1
graphs graphs_compiled 90 $dtype sdd-compiled
speed speed_batch_large 80 $depth $fewer_rounds rows_again $large
speed speed_batch_medium 50 $depth $fewer_rounds rows_again $medium
speed speed_deeper 85 $deeper $fewer_rounds rows_again 1 $deeper_large
training_step training_step_grid_16 70 0
training_step training_step_grid_32 50 1
training_step training_step_grid_64 50 2
if "$PYTHON" -c "import datasets" 2>/dev/null; then
    stage train 75 "$PYTHON" benchmarks/training_run.py --device $device --mixed_precision $precision \
        "${training[@]}" --output "$OUT/train.json"
else
    leave_out train "datasets is not installed"
fi
stage decoder_slices 20 "$PYTHON" benchmarks/decoder_slices.py --device $device --dtype $dtype \
    --batch_size $slices "${slicing[@]}" --output "$OUT/decoder_slices.json"
if [ -n "${DIFFUSERS_SOURCE:-}" ]; then
    tests diffusers_suite 110 $processes $suite
else
    leave_out diffusers_suite "DIFFUSERS_SOURCE is not set"
fi

echo "$OUT/summary.md" >&2
exit $has_failed
