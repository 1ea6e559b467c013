#!/usr/bin/env bash
# Everything a session with a GPU does first, in one command of at most nine minutes: time, then test.
#
#     bash bench/on_gpu.sh [COMMIT]
#
# COMMIT goes into the results where the working tree arrives without its git folder. Logs and JSON land in $OUT if that
# is set, else in bench/results. At its end it says what has been verified and what has not; what ran out of time has
# not. Exit status: 0 if all is green and everything ran, 1 otherwise.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
commit=${1:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
unset TRITON_INTERPRET
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Without -P the folder ./kernels would shadow Hugging Face's package of that name, which transformers imports.
python=(python3 -P)
pytest=("${python[@]}" -m pytest -q -p no:cacheprovider)
verified=()
unverified=()

# What the figures are taken on, in case a later step never ends.
{
    date --utc +%FT%TZ
    echo "commit $commit"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
    "${python[@]}" -c 'import sys, torch, transformers, triton
print(sys.version, torch.__version__, torch.version.cuda, transformers.__version__, triton.__version__)'
} 2>&1 | tee "$out/circumstances.txt"

# imdc.kernels lies in ./kernels, which only an installation maps to its name. There is no network to build with.
"${python[@]}" -c 'import imdc.kernels' 2>/dev/null ||
    "${python[@]}" -m pip install --quiet --no-build-isolation --no-deps --editable . || exit 1

# Accesses out of bounds or misaligned, on the tests that reach every kernel by every way of loading. PyTorch's cache
# of memory is off, as inside one of its blocks nothing counts as out of bounds. Hazards in shared memory are only
# reported: the sanitizers have taken Hopper's asynchronous instructions for errors before.
sanitized=(
    tests/test_kernel_chunk_attention.py::test_reads_slices_and_nothing_beside_them
    tests/test_kernel_compress_step.py::test_ties_go_to_the_lowest_index
    tests/test_kernel_compress_step.py::test_two_runs_give_the_same_bits
    tests/test_kernel_compact.py::test_moves_between_slices
    tests/test_kernel_select.py::test_forced_keys_are_kept
)
# judge WHAT STATUS: files WHAT under verified if STATUS is 0; timeout(1) gives 124 to what ran out of time.
judge() {
    if [ "$2" -eq 0 ]; then
        verified+=("$1")
    elif [ "$2" -eq 124 ]; then
        unverified+=("$1: ran out of time")
    else
        unverified+=("$1: exit status $2")
    fi
}
report() {
    echo "verified:"
    printf '  %s\n' "${verified[@]:-nothing}"
    echo "NOT verified:"
    printf '  %s\n' "${unverified[@]:-nothing}"
    [ "${#unverified[@]}" -eq 0 ]
}

# Most valuable first. Nothing is timed where a check at the timed shapes is red; every block size of the attention
# kernel is timed too, so that one session suffices to choose among them.
timeout 140 python3 bench/kernel_timings.py --sweep --out "$out" --commit "$commit" 2>&1 |
    tee "$out/kernel_timings.log"
judge "checks at the timed shapes, kernel timings" "${PIPESTATUS[0]}"

timeout 60 python3 bench/long_prompts.py --prompt-tokens 32768 --repeats 2 --ways imdc fm full-cudnn full-flash \
    --profile --out "$out" --commit "$commit" 2>&1 | tee "$out/long_prompts.log"
judge "whole prefills of 32k tokens" "${PIPESTATUS[0]}"

# Most of a test's time on a device is compiling. Two files are about the compiler and a script and need no device.
# Interrupted, pytest still says which tests were red.
tests=(tests/test_kernel_*.py)
tests=("${tests[@]/tests\/test_kernel_aot.py/}")
tests=("${tests[@]/tests\/test_kernel_timings.py/}")
timeout -s INT 180 "${pytest[@]}" -n 16 -rfE ${tests[@]} >"$out/kernel_tests.log" 2>&1
judge "kernel tests" $?
tail -n 15 "$out/kernel_tests.log"

# Pinned memory and streams of their own exist on a device only. A few tests compare with what a CPU gives.
timeout -s INT 60 "${pytest[@]}" -n 8 -rfE --device cuda tests/test_recall*.py >"$out/recall_tests.log" 2>&1
judge "recall" $?
tail -n 5 "$out/recall_tests.log"

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # With errors the sanitizer exits with 9, whatever the tests say.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${pytest[@]}" "${sanitized[@]}" >"$out/$tool.log" 2>&1
        judge "$tool" $?
        grep -E 'passed|failed|SUMMARY' "$out/$tool.log"
    done
else
    unverified+=("memory accesses: no compute-sanitizer here")
fi
report
