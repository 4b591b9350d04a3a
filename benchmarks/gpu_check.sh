#!/usr/bin/env bash
# Everything there is to see on a machine with a GPU; no network needed. Some 7 minutes with 16 cores.
#
#   benchmarks/gpu_check.sh [OUT]     OUT: benchmarks/results/cuda-NAME-OF-THE-GPU unless given
#
# Builds the extension from this tree, reads its machine code, runs the GPU tests (each file in a process of its own, as
# a kernel that breaks the device breaks it for its process), compute-sanitizer beside them, then measures the card's
# ceilings, looks for wrong ids, runs the benchmark and trains a little. OUT gets log.txt with all that is printed, and
# tables, JSON and plot. A step that fails stops no other; the exit status is 1 when one did. Python is $PYTHON, or
# python3.
# GPU_CHECK_SECONDS (560) is when the last step has to end.
set -u -o pipefail

readonly SKIPPED=77

say() { printf '%s\n' "$*"; }

# limited SECONDS COMMAND...: at most so long, and never past the end of the whole check.
limited() {
  local limit=$1 left=$((END - SECONDS))
  shift
  if ((left < limit)); then limit=$((left > 1 ? left : 1)); fi
  timeout --kill-after=10 "$limit" "$@"
}

# step NAME COMMAND...
step() {
  local name=$1 start=$SECONDS status verdict
  shift
  printf '\n==== %s\n' "$name"
  "$@"
  status=$?
  case $status in
    0) verdict=ok ;;
    "$SKIPPED") verdict=skipped ;;
    124 | 137) verdict="FAILED (time was up)" ;;
    *) verdict="FAILED (status $status)" ;;
  esac
  [[ $verdict == FAILED* ]] && failures=$((failures + 1))
  summary+=("$(printf '%-14s %4d s  %s' "$name" "$((SECONDS - start))" "$verdict")")
}

environment() {
  date -u '+%Y-%m-%d %H:%M UTC'
  uname -srm
  nproc
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>&1
  nvcc --version 2>&1 | tail -n 1
  limited 60 "$PYTHON" -c '
import importlib.metadata, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "vector-quantize-pytorch"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing")
'
}

build() {
  limited 240 "$PYTHON" setup.py -q build_ext --inplace ||
    limited 240 "$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps
}

sass() { limited 60 "$PYTHON" -m benchmarks.cuda.sass_report 2>&1 | tee "$out/sass.txt"; }

test_file() {
  local file=$1 status
  OMP_NUM_THREADS=2 limited 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -o faulthandler_timeout=60 "$file" \
    >"$scratch/$(basename "$file").txt" 2>&1
  status=$?
  ((status == 5)) && status=0 # no GPU test in this file
  return "$status"
}

# Files side by side: they wait for the host most of the time.
tests() {
  local file pids=() files=() failed=0 place
  mapfile -t files < <(grep -lE 'mark\.gpu|device: torch\.device' tests/test_*.py tests/*/test_*.py)
  for file in "${files[@]}"; do
    test_file "$file" &
    pids+=($!)
  done
  for place in "${!files[@]}"; do
    if wait "${pids[$place]}"; then
      say "${files[$place]}: $(tail -n 1 "$scratch/$(basename "${files[$place]}").txt")"
    else
      failed=1
      say "${files[$place]}: FAILED"
      tail -n 80 "$scratch/$(basename "${files[$place]}").txt"
    fi
  done
  return "$failed"
}

# sanitize TOOL: in the background; collect says how it went. Without PyTorch's cache of device memory, as no access is
# out of bounds inside one of its blocks.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 170 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 10 \
    "$PYTHON" tests/helpers/cuda_small.py >"$scratch/$1" 2>&1
}

# collect TOOL PID
collect() {
  local status
  if ! command -v compute-sanitizer >/dev/null; then
    say "no compute-sanitizer on PATH"
    return "$SKIPPED"
  fi
  wait "$2"
  status=$?
  tail -n 60 "$scratch/$1"
  if ((status != 0)) && grep -q 'Device not supported' "$scratch/$1"; then
    return "$SKIPPED"
  fi
  return "$status"
}

exactness() {
  limited 100 "$PYTHON" -m benchmarks.exactness --device cuda 2>&1 | tee "$out/exactness.txt"
}

bench() {
  local known=()
  [[ -s $out/ceilings.json ]] && known=(--ceilings "$out/ceilings.json")
  limited 260 "$PYTHON" benchmarks/quantize_bench.py --device cuda --budget 150 "${known[@]}" --out "$out"
}

# What is installed decides how much of this can run.
train() {
  limited 150 "$PYTHON" -m benchmarks.training.train_bench --device cuda --minutes 0.3 2>"$scratch/train" |
    tee "$out/train.txt"
  local status=$?
  ((status == 0)) || tail -n 30 "$scratch/train"
  return "$status"
}

check() {
  local memcheck racecheck
  step environment environment
  step build build
  step sass sass
  sanitize memcheck &
  memcheck=$!
  sanitize racecheck &
  racecheck=$!
  step tests tests
  step memcheck collect memcheck "$memcheck"
  step racecheck collect racecheck "$racecheck"
  step ceilings limited 120 "$PYTHON" -m benchmarks.cuda.ceilings --out "$out/ceilings.json"
  step exactness exactness
  step benchmark bench
  step train train
  printf '\n==== %d s in all; results in %s\n' "$SECONDS" "$out"
  printf '%s\n' "${summary[@]}"
  ((failures == 0))
}

if (($# > 1)) || [[ ${1:-} == -* ]]; then
  say "usage: benchmarks/gpu_check.sh [OUT]" >&2
  exit 2
fi
PYTHON=${PYTHON:-python3}
END=${GPU_CHECK_SECONDS:-560}
out=${1:-}
[[ -n $out ]] && mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if ! name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
  say "gpu_check.sh: $PYTHON has no PyTorch that finds a CUDA device" >&2
  exit 2
fi
if [[ -z $out ]]; then
  out=$PWD/benchmarks/results/cuda-$(tr -cs '[:alnum:]\n' - <<<"${name#NVIDIA }" | tr '[:upper:]' '[:lower:]')
  mkdir -p "$out" || exit 2
fi
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
summary=()
failures=0
# cmake and ninja may lie beside an interpreter that is not on the PATH.
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
check 2>&1 | tee "$out/log.txt"
