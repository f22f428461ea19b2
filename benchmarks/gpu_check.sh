#!/usr/bin/env bash
# Everything that ten minutes on a GPU can verify and measure, in one call:
#
#   bash benchmarks/gpu_check.sh [OUTPUT_DIRECTORY]
#
# Builds for this GPU in the source tree, runs the kernel tests on the device, compute-sanitizer,
# the stress program and the benchmarks. Needs torch with CUDA, nvcc, cmake and pytest in the current
# environment (PYTHON names the interpreter), and nothing from a network. Writes logs, kernels.json
# and gpu_verified.json to the output directory (benchmarks/results by default). DRY_RUN=1 goes
# through the same steps on a CPU and writes no gpu_verified.json.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
logs=$out/gpu_check_logs
mkdir -p "$logs"
dry=${DRY_RUN:-}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
began=$SECONDS

step() {  # step NAME SECONDS COMMAND...: with a limit and a log; says how it went
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" bash -c '"$@"' _ "$@" >"$logs/$name.log" 2>&1
  status=$?
  echo "$status" >"$logs/$name.status"
  printf '%-22s %s after %d s: %s\n' "$name" "$([ $status = 0 ] && echo passed || echo "FAILED ($status)")" \
    $((SECONDS - start)) "$(tail -n 1 "$logs/$name.log" | cut -c1-120)"
  return $status
}

build() {
  local torch_dir archs=90
  torch_dir=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
  [ -n "$dry" ] || archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  cmake -S . -B build/gpu_check -GNinja -DVISPRUNER_TORCH_DIR="$torch_dir" \
    -DPython3_EXECUTABLE="$(command -v "$python")" -DVISPRUNER_CUDA=ON \
    -DVISPRUNER_CUDA_ARCHS="$archs" -DVISPRUNER_PTXAS_REPORT=ON &&
    cmake --build build/gpu_check --parallel &&
    rm -f vispruner_cuda/libvispruner.so &&
    cp build/gpu_check/libvispruner.so vispruner_cuda/ &&
    "$python" -m vispruner_cuda
}

sanitizer() {  # sanitizer TOOL
  local options=(--tool "$1" --error-exitcode 9 --print-limit 20)
  [ "$1" != memcheck ] || options+=(--leak-check no)
  # Memory from the caching allocator hides overruns between tensors.
  if [ -n "$dry" ]; then echo "dry run: compute-sanitizer ${options[*]}"; return 0; fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" "$python" benchmarks/sanitize.py
}

export python dry
export -f build sanitizer  # timeout starts a shell of its own
step build 240 build || { cat "$logs/build.log"; exit 1; }

# Beside each other: none of these is timed, and all of them wait for a processor most of the time.
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" 240 sanitizer "$tool" &
done
# The random cases are shared out over the tests; a GPU call each costs about a millisecond. What is
# left out tests the CPU's instruction sets.
export VISPRUNER_RANDOM_CASES=${VISPRUNER_RANDOM_CASES:-2000}
step tests 260 "$python" -m pytest tests/ops -q -p no:cacheprovider \
  --ignore tests/ops/test_instruction_sets.py
wait
if [ -z "$dry" ]; then step stress 90 "$python" benchmarks/stress.py; fi
left=$((595 - (SECONDS - began)))
step benchmarks $((left < 5 ? 5 : left < 220 ? left : 220)) "$python" benchmarks/kernels.py --rows --quick \
  --compile-limit 40 ${dry:+--device cpu --no-compile} -o "$out"

if [ -n "$dry" ]; then echo "dry run: nothing verified"; exit 0; fi
"$python" benchmarks/verdict.py "$logs" "$out"
