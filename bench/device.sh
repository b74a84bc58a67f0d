#!/usr/bin/env bash
# Builds fastvae with CUDA on a machine with a GPU, tests it, runs the sanitizers and the benchmark:
#
#   bench/device.sh [--part build|tests|sanitize|bench]... [--dry-run] [-- ARGUMENTS OF python -m bench]
#
# Needs python3 with torch (CUDA), scikit-build-core, pybind11, pytest, hypothesis, scipy; cmake,
# ninja, nvcc. No network, no .git. Each part has a time limit, together under 9 minutes; after a
# failed part the others still run, and the exit status tells. Results, six files at most:
# $OUT, or bench/results/<date>-<gpu>. GPU settings are only read.
#
# --dry-run needs no GPU: it compiles all that nvcc and g++ can, and prints what would be run.
# Environment: PYTHON (python3), FASTVAE_DEVICE_PREFIX (where to build and install).
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
prefix=${FASTVAE_DEVICE_PREFIX:-${TMPDIR:-/tmp}/fastvae-device-$UID}
site=$prefix/site
parts=() bench_arguments=() dry=0
while (( $# )); do
  case $1 in
    --part) parts+=("${2:-}"); shift 2 || shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; bench_arguments=("$@"); break ;;
    *) echo "device.sh: no option $1; see the top of $0" >&2; exit 2 ;;
  esac
done
(( ${#parts[@]} )) || parts=(build tests sanitize bench)
for part in "${parts[@]}"; do
  case $part in
    build|tests|sanitize|bench) ;;
    *) echo "device.sh: --part must be build, tests, sanitize or bench, got ${part:-nothing}" >&2
       exit 2 ;;
  esac
done

# The machine, as torch sees it: "9.0 nvidia-h200", or nothing.
gpu=$("$python" -c '
import re, torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}", re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-"))
' 2> /dev/null)
if [[ -z $gpu ]] && (( ! dry )); then
  echo "device.sh: $python has no torch that sees a GPU; --dry-run does what can be done without" >&2
  exit 2
fi
read -r capability name <<< "${gpu:-9.0 no-gpu}"
out=${OUT:-bench/results/$(date -u +%F)-$name}
if (( dry )); then out=$prefix/dry-run; fi
mkdir -p "$out" "$prefix"
out=$(cd "$out" && pwd)
: > "$out/device.log"

export FASTVAE_CUDA=ON TORCH_CUDA_ARCH_LIST=$capability
export PYTHONUNBUFFERED=1
# The working directory stays off the path (the bench puts it last by itself): the source folder
# fastvae/ there has no compiled module, and would be imported in place of the installed one.
safe=(env "PYTHONPATH=$site" PYTHONSAFEPATH=1)

run() { # run SECONDS COMMAND...: with a time limit, into the log; prints it alone in a dry run
  local limit=$1; shift
  echo "+ timeout $limit $*"
  (( dry )) && return 0
  timeout -k 5 "$limit" "$@"
}

environment() {
  {
    date -u +%FT%TZ; uname -srm; lscpu | grep -E '^(Model name|CPU\(s\))'
    nvidia-smi --format=csv --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,persistence_mode
    nvcc --version | tail -n 2; cmake --version | head -n 1; g++ --version | head -n 1
    "$python" -c 'import sys, torch; print("python", sys.version); print(torch.__config__.show())'
    git rev-parse HEAD
  } > "$out/environment.txt" 2>&1
}

part_build() { # torch files on all cores, for this GPU alone
  run 130 "$python" -m pip install --no-build-isolation --no-deps --no-index --no-cache-dir \
    --upgrade --target "$site" --config-settings="build-dir=$prefix/build" . || return
  run 20 "${safe[@]}" "$python" -c '
import fastvae
info = fastvae.build_info()
print(*(f"{k}: {v}" for k, v in info.items()), sep="\n")
raise SystemExit(0 if info["cuda"] else "device.sh: built, but without CUDA")'
}

part_tests() { # what only a device can show; then all that runs on any, in several processes
  local i code status=0 pids=() log shards=8
  local pytest=(env FASTVAE_TEST_DEVICE=cuda "${safe[@]:1}" "$python" -m pytest -q
    -p no:cacheprovider --tb=short --maxfail=10)
  run 30 "${pytest[@]}" tests/test_cuda.py || status=$?
  # Those that ask for the device: what they import must be there.
  local tests
  mapfile -t tests < <(grep -lE '^def test.*\<device\>' tests/test_*.py)
  for ((i = 0; i < shards; ++i)); do
    run 90 env "FASTVAE_TEST_SHARD=$i/$shards" OMP_NUM_THREADS=2 "${pytest[@]:1}" "${tests[@]}" \
      > "$prefix/tests-$i.log" 2>&1 &
    pids+=($!)
  done
  for ((i = 0; i < shards; ++i)); do
    wait "${pids[i]}"; code=$?
    (( code )) && status=$code
    log=$prefix/tests-$i.log
    echo "tests, part $i of $shards: exit status $code"
    tail -n $((code ? 60 : 2)) "$log" | sed "s/^/    /"
  done
  return $status
}

part_sanitize() { # all tools at once: they are not timed
  local sanitizer tool status=0
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null \
    | tail -n 1)
  run 25 "${safe[@]}" "$python" bench/sanitize.py cuda 15 || return
  if [[ -z $sanitizer ]]; then
    echo "skipped: no compute-sanitizer here"
    (( dry )) || return 77
    sanitizer=compute-sanitizer
  fi
  local pids=()
  for tool in memcheck racecheck initcheck synccheck; do
    # Uncached, so that an access past the end of a tensor leaves its allocation. Torch's own
    # kernels run unwatched.
    run 65 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=4 "${safe[@]:1}" "$sanitizer" --tool "$tool" \
      --kernel-name kernel_substring=fastvae --error-exitcode 9 --print-limit 20 \
      "$python" bench/sanitize.py cuda 50 > "$prefix/$tool.log" 2>&1 &
    pids+=($!)
  done
  local i=0 code
  for tool in memcheck racecheck initcheck synccheck; do
    wait "${pids[i++]}"; code=$?
    if (( code )) && grep -qiE 'device not supported|not supported on this' "$prefix/$tool.log"; then
      echo "$tool: skipped, compute-sanitizer refuses this machine"
      (( status )) || status=77
    else
      (( dry )) || echo "$tool: exit status $code"
      (( code )) && status=1
    fi
    tail -n 30 "$prefix/$tool.log" | sed "s/^/    /"
  done
  return $status
}

part_bench() { # ended early, it still writes what it has
  local bench=(env "PYTHONPATH=$site" "$python" -m bench --device cuda)
  if (( ${#bench_arguments[@]} )); then
    run 170 "${bench[@]}" --out "$out" "${bench_arguments[@]}"
    return
  fi
  run 20 "${bench[@]}" --predict
  run 120 "${bench[@]}" --out "$out" --dtype float32 bfloat16
  local code=$?
  run 40 "${bench[@]}" --steps && return $code
}

dry_compile() {
  local failed=0 fake=$prefix/fake site_packages source
  .ci/nvcc || failed=1
  # The torch files as a CUDA build sees them. A CPU torch lacks one generated header.
  mkdir -p "$fake/c10/cuda/impl"
  : > "$fake/c10/cuda/impl/cuda_cmake_macros.h"
  site_packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for source in csrc/*.cpp; do
    [[ $source == csrc/module.cpp ]] && continue  # the only one that wants pybind11, and no CUDA
    g++ -std=c++20 -fsyntax-only -fopenmp -DFASTVAE_CUDA -I"$fake" \
      -isystem "$site_packages/torch/include" \
      -isystem "$site_packages/torch/include/torch/csrc/api/include" \
      -isystem "$(dirname "$(readlink -f "$(command -v nvcc)")")/../include" \
      -isystem "$(ls -d /usr/local/cuda*/include | tail -n 1)" "$source" \
      && echo "$source: compiles with FASTVAE_CUDA" || failed=1
  done
  return $failed
}

declare -A verdict
failed=0
step() { # step NAME COMMAND: runs it, into the log, and notes how it went
  local name=$1 begin=$SECONDS; shift
  echo "=== $name"
  "$@" 2>&1 | tee -a "$out/device.log"
  local code=${PIPESTATUS[0]} word
  case $code in
    0) word=ok ;;
    77) word=skipped ;;
    124|137) word="out of time" failed=1 ;;
    *) word="failed ($code)" failed=1 ;;
  esac
  verdict[$name]="$word, $((SECONDS - begin)) s"
}

environment
steps=()
if (( dry )); then steps+=(compile); step compile dry_compile; fi
for part in "${parts[@]}"; do
  steps+=("$part")
  if [[ $part != build && ! -d $site ]] && (( ! dry )); then
    step "$part" bash -c "echo 'not built: run --part build first'; exit 1"
  else
    step "$part" "part_$part"
  fi
done
{
  echo "=== summary"
  for name in "${steps[@]}"; do printf '%-10s %s\n' "$name" "${verdict[$name]}"; done
  echo "results in $out"
} | tee -a "$out/device.log"
if (( $(wc -c < "$out/device.log") > 8000000 )); then  # what matters comes last
  tail -c 8000000 "$out/device.log" > "$prefix/log" && mv "$prefix/log" "$out/device.log"
fi
exit $failed
