#!/usr/bin/env bash
# Verifies and measures everything on a GPU in one call of at most ten minutes:
#
#   bash benchmarks/gpu_check.sh [OUTPUT_DIRECTORY]
#
# Builds for this GPU in the source tree, verifies all operators, runs the kernel tests on the device,
# compute-sanitizer, the stress program and the benchmarks. Needs torch with CUDA, nvcc, cmake, ninja,
# pytest, hypothesis, numpy and pybind11 in the current environment (PYTHON names the interpreter), but
# no network.
#
# The output directory (benchmarks/results by default) gets four files, each as early as possible:
#
#   gpu_verified.json        results, with the hash of the sources; rewritten after every step
#   vispruner_verify.json    report of `python -m vispruner_cuda --verify`
#   kernels.json             results of the benchmarks
#   gpu_check_logs.tar.gz    logs of all steps
#
# The script ends within TIME_LIMIT seconds (585 by default), which also limit each step. If it is
# interrupted, the files have the results so far. DRY_RUN=1 runs the same steps on a CPU in less than 290
# seconds and writes gpu_dry_run.json instead of gpu_verified.json.
#
# The directory and PYTHON are relative to the current directory. `--help` prints this text.
set -uo pipefail
unset CDPATH  # `cd` would search in it, and print

refuse() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  -*) refuse "unknown option $1: the only argument is a directory (./$1 if it has this name), and --help explains it" ;;
esac
[ $# -le 1 ] || refuse "unexpected argument $2: name one output directory, in quotes if it has spaces"
case ${DRY_RUN:-} in
  '' | 0) dry= ;;
  1) dry=1 ;;
  *) refuse "DRY_RUN must be 1 (on a CPU) or 0 (on a GPU), got $DRY_RUN" ;;
esac
time_limit=${TIME_LIMIT:-$([ -n "$dry" ] && echo 285 || echo 585)}
# In less than 12 seconds no step would start.
[[ $time_limit =~ ^[1-9][0-9]{0,5}$ ]] && [ "$time_limit" -ge 12 ] ||
  refuse "TIME_LIMIT must be a whole number of seconds from 12 to 999999, got $time_limit"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || refuse "PYTHON: there is no program $python: name a Python with torch"
[[ $python != */* || $python == /* ]] || python=$PWD/$python
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
out=${1:-$root/benchmarks/results}
# A file is created to find out: root may write to directories that take no files, such as /proc.
mkdir -p "$out" 2>/dev/null && out=$(cd "$out" 2>/dev/null && pwd) &&
  probe=$(mktemp "$out/.gpu_check.XXXXXX" 2>/dev/null) && rm "$probe" ||
  refuse "cannot write to the output directory ${1:-$out}: name a directory that you can write to"
work=$(mktemp -d) || refuse "cannot create a directory for the logs: set TMPDIR to one that you can write to"
cd "$root" || exit 2
logs=$work/gpu_check_logs
mkdir "$logs"
rm -f "$out/vispruner_verify.json"  # an earlier run's report must not be read as this one's
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
# On a busy machine, threads would mostly wait for each other.
[ -z "$dry" ] || export OMP_NUM_THREADS=1
export PATH=$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin  # nvcc and compute-sanitizer

tools=(memcheck racecheck initcheck synccheck)
closing=6 # seconds reserved for the last report
declare -A pids=()

report() {  # writes the report and the logs so far
  local status
  "$python" -S benchmarks/verify/write_report.py "$logs" "$out" ${dry:+--dry-run} ${1:-}
  status=$?
  tar -C "$work" -czf "$out/gpu_check_logs.tar.gz.new" gpu_check_logs &&
    mv "$out/gpu_check_logs.tar.gz.new" "$out/gpu_check_logs.tar.gz"
  return $status
}

start() {  # start NAME SECONDS COMMAND...: in the background, with a limit and a log
  local name=$1 most=$2 room=$((time_limit - closing - SECONDS))
  shift 2
  [ "$most" -lt "$room" ] || most=$room
  if [ "$most" -lt 5 ]; then
    echo 'not run' >"$logs/$name.status"
    return
  fi
  # The time limit includes child processes; the inner shell can run the functions below.
  timeout --kill-after=5 "$most" bash -c 'at=$1; shift; "$@"; status=$?; echo "$SECONDS" >"$at"; exit $status' \
    _ "$logs/$name.seconds" "$@" >"$logs/$name.log" 2>&1 </dev/null &
  pids[$name]=$!
}

finish() {  # finish NAME: waits for a step and prints its result
  local name=$1 status=1
  if [ -n "${pids[$name]:-}" ]; then
    wait "${pids[$name]}"  # a signal interrupts this wait, and no other command
    status=$?
    unset "pids[$name]"
    echo "$status" >"$logs/$name.status"
  fi
  printf '%-16s %s, %s s: %s\n' "$name" "$(case $(cat "$logs/$name.status") in
    0) echo passed ;; 124 | 137) echo 'TIMED OUT' ;; *[a-z]*) cat "$logs/$name.status" ;;
    *) echo "FAILED ($status)" ;; esac)" "$(cat "$logs/$name.seconds" 2>/dev/null || echo '-')" \
    "$(tail -n 1 "$logs/$name.log" 2>/dev/null | cut -c1-120)"
  report --quiet
  return "$status"
}

step() { start "$@"; finish "$1"; }

stopped() {  # stopped STATUS: runs at any end of the script
  trap '' EXIT TERM INT HUP
  local name unclean=0
  for name in "${!pids[@]}"; do
    kill "${pids[$name]}" 2>/dev/null  # the `timeout` process, which forwards it
    echo 'stopped' >"$logs/$name.status"
  done
  report || unclean=1
  rm -rf "$work"
  exit $(($1 ? $1 : unclean))
}
trap 'stopped $?' EXIT
trap 'stopped 143' TERM
trap 'stopped 130' INT
trap 'stopped 129' HUP

build() {
  local torch_dir archs=90
  torch_dir=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
  [ -n "$dry" ] || archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  cmake -S . -B build/gpu_check -GNinja -DVISPRUNER_TORCH_DIR="$torch_dir" \
    -DPython3_EXECUTABLE="$(command -v "$python")" -DVISPRUNER_CUDA=ON \
    -DVISPRUNER_CUDA_ARCHS="$archs" -DVISPRUNER_PTXAS_REPORT=ON &&
    cmake --build build/gpu_check --parallel &&
    rm -f vispruner_cuda/libvispruner.so vispruner_cuda/libvispruner.txt &&
    cp build/gpu_check/libvispruner.so vispruner_cuda/ &&
    "${CUDACXX:-nvcc}" -arch="sm_$archs" -o build/gpu_check/sanitizer_probe benchmarks/verify/sanitizer_probe.cu
}

describe() {
  "$python" -c 'import json, sys, provenance
json.dump(provenance.describe(), open(sys.argv[1], "w"))' "$logs/provenance.json"
}

sanitizer() {  # sanitizer TOOL COMMAND...
  local options=(--tool "$1" --error-exitcode 9 --print-limit 20)
  case $1 in # tools that run at the same time need ports of their own
    racecheck) options+=(--port 49172) ;;
    initcheck) options+=(--port 49192) ;;
    synccheck) options+=(--port 49212) ;;
  esac
  # Only the kernels of this library: torch's take long, and their errors are not ours.
  options+=(--kernel-name kns=vispruner)
  # Failing CUDA calls are not invalid accesses: torch probes features with them.
  [ "$1" != memcheck ] || options+=(--leak-check no --report-api-errors no)
  compute-sanitizer "${options[@]}" "${@:2}"
}

# compute-sanitizer is missing in some installations and cannot trace processes in some containers
# (gVisor). It works if it finds the error of a faulty program. The tools of one that does not are
# unavailable, and the run can be clean; if this step does not finish, it is not.
sanitizer_works() {
  if ! command -v compute-sanitizer; then
    echo 'there is no compute-sanitizer'
    return 1
  fi
  sanitizer memcheck build/gpu_check/sanitizer_probe
  [ $? = 9 ] || { echo 'compute-sanitizer does not find the fault of benchmarks/verify/sanitizer_probe.cu'; return 1; }
}

sanitize() {
  # The caching allocator would hide overruns between tensors.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer "$1" "$python" benchmarks/verify/sanitize.py
}

export python dry logs
export -f build describe sanitizer sanitizer_works sanitize

step build 200 build || { cat "$logs/build.log"; exit 1; }
step provenance 30 describe
step probe 40 "$python" -m vispruner_cuda  # not a condition of the next steps: they say what is wrong

step verify 150 "$python" -m vispruner_cuda --verify -o "$out/vispruner_verify.json" \
  --device $([ -n "$dry" ] && echo cpu --quick || echo cuda)

# In parallel: none of these is timed, and all of them mostly wait for a processor.
if step sanitizer_works 40 sanitizer_works; then
  for tool in "${tools[@]}"; do start "$tool" 170 sanitize "$tool"; done
else
  without=$(cat "$logs/sanitizer_works.status")
  [ "$without" != 1 ] || without=unavailable
  for tool in "${tools[@]}"; do
    echo "$without" >"$logs/$tool.status"
    tail -n 1 "$logs/sanitizer_works.log" >"$logs/$tool.log"
  done
fi
# The random cases are divided among the tests; each costs a GPU call of some milliseconds, as the
# sanitizers use the GPU in turns with the tests. Tests of
# the CPU's instruction sets and of the compiled kernels on the host are skipped.
export VISPRUNER_TEST_COMPILED_KERNELS=0
export VISPRUNER_RANDOM_CASES=${VISPRUNER_RANDOM_CASES:-$([ -n "$dry" ] && echo 100 || echo 1000)}
step tests 250 "$python" -m pytest tests/ops -q -p no:cacheprovider \
  --ignore tests/ops/test_instruction_sets.py ${dry:+-m 'not slow'}
for tool in "${tools[@]}"; do finish "$tool"; done

step stress 80 "$python" benchmarks/verify/stress.py ${dry:+--help}

step benchmarks 300 "$python" -m operators.gpu --goals --quick --compile-limit 60 \
  ${dry:+--device cpu} -o "$out"
exit 0
