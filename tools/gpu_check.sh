#!/usr/bin/env bash
# Builds, tests and measures sage_jax on a machine with an NVIDIA GPU. Needs no network.
#
#   tools/gpu_check.sh [options] [step ...]
#
# Steps, in this order whatever the order given; all of them by default:
#   build      the native modules, in place, for the visible GPU's architecture
#   test       pytest -m gpu
#   sanitize   compute-sanitizer (memcheck, racecheck, synccheck) on small cases
#   bench      benchmarks/attention.py; an earlier result of the same code is completed
#   lengths    benchmarks/lengths.py, with a causal mask and without
#   memory     benchmarks/memory.py
#   sparse     benchmarks/sparse.py
#
# Options:
#   --out DIR             where logs and JSON go (default: build/gpu_check)
#   --python PROGRAM      Python with JAX's CUDA plugin (default: python3)
#   --wheels DIR          wheels of Python packages that the machine lacks; installed for this run
#   --archs LIST          CUDA architectures, such as "80;90a" (default: the visible GPU's)
#   --limit STEP=SECONDS  time limit of a step (build 420, test 300, sanitize 240, bench 540,
#                         lengths 240, memory 240, sparse 240)
#   --pytest ARGUMENTS    added to the test step, such as "-x -k backward"
#   --bench ARGUMENTS     added to the bench step, such as "--passes fwd --head-dim 128"
#
# The last lines say how each step ended; the exit status is 0 if all did well. A step that fails
# does not keep the later ones from running, except that nothing is tested on a failed build.
set -u -o pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "gpu_check.sh: $*" >&2; exit 2; }

steps=(build test sanitize bench lengths memory sparse)
declare -A limit=([build]=420 [test]=300 [sanitize]=240 [bench]=540 [lengths]=240 [memory]=240 [sparse]=240) wanted=()
out=build/gpu_check python=python3 wheels='' archs='' pytest_args='' bench_args=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --out | --python | --wheels | --archs | --limit | --pytest | --bench)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help" ;;&
    --out) out=$2; shift ;;
    --python) python=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --archs) archs=$2; shift ;;
    --pytest) pytest_args=$2; shift ;;
    --bench) bench_args=$2; shift ;;
    --limit)
      [[ $2 =~ ^([a-z]+)=([1-9][0-9]*)$ && -n ${limit[${BASH_REMATCH[1]}]:-} ]] \
        || fail "--limit $2 is not of the form STEP=SECONDS; see --help"
      limit[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}; shift ;;
    *)
      [[ $1 =~ ^[a-z]+$ && -n ${limit[$1]:-} ]] \
        || fail "unknown argument '$1'; the steps are build, test, sanitize, bench, lengths, memory and sparse; see --help"
      wanted[$1]=yes ;;
  esac
  shift
done
[ ${#wanted[@]} -gt 0 ] || for step in "${steps[@]}"; do wanted[$step]=yes; done

mkdir -p "$out" || fail "the folder $out cannot be made"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl \
    || fail "the wheels in $wheels could not be installed"
  export PYTHONPATH=$PYTHONPATH:$site PATH=$PATH:$site/bin
fi

command -v nvidia-smi > /dev/null \
  || fail "nvidia-smi is missing: this is for a machine with an NVIDIA GPU"
nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader \
  || fail "nvidia-smi sees no GPU"
"$python" - << 'PY' || exit 2
import importlib.util as util, sys
wanted = ("jax", "jaxlib", "numpy", "nanobind", "pytest", "hypothesis")
missing = [name for name in wanted if not util.find_spec(name)]
if missing:
    names = ", ".join(missing)
    sys.exit(f"gpu_check.sh: {sys.executable} lacks {names}; install them or pass --wheels")
import jax
try:
    jax.devices("cuda")
except RuntimeError as reason:
    sys.exit(f"gpu_check.sh: JAX of {sys.executable} sees no GPU ({reason}); install jax[cuda13]")
PY

# ---- the steps, each run in a shell of its own under `timeout`

step_build() {
  local folder
  folder=build/gpu_$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
  cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSAGE_JAX_CUDA=ON \
    -DSAGE_JAX_CUDA_ARCHS="$archs" -DPython_EXECUTABLE="$(command -v "$python")" \
    && cmake --build "$folder"
}

# The specification runs on the host and takes most of the time: several processes share the GPU.
step_test() {
  local parallel=''
  if "$python" -c 'import xdist' 2> /dev/null; then
    parallel="-n $(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2)) --dist loadgroup"
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
  fi
  # shellcheck disable=SC2086  # the arguments are lists of words
  "$python" -m pytest -m gpu -q --durations=5 --junitxml="$out/tests.xml" \
    $parallel $pytest_args tests
}

# Accesses out of bounds show only when every buffer is an allocation of its own, outside of a pool;
# racecheck loses track of kernels that a CUDA graph launches.
step_sanitize() {
  command -v compute-sanitizer || { echo "compute-sanitizer is not installed"; return 1; }
  export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_PYTHON_CLIENT_PREALLOCATE=false
  export XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}"
  local tool chosen code=0
  for tool in memcheck racecheck synccheck; do
    echo "-- $tool"
    chosen=''
    # It counts a lane's arrival for that lane's reads alone, not for those of the lanes that it has met at a __syncwarp: copies
    # to places that are used again would all be races (docs/kernels/sm90_forward.md, "Shared memory").
    [ $tool != racecheck ] || chosen='-k not(stay)'
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$python" -m pytest -m gpu -q ${chosen:+"$chosen"} tests/test_gpu_sanitizer.py || code=$?
  done
  return $code
}

# Runs a benchmark and keeps its results, even those of one that failed.
measure() {
  local code=0
  "$python" "$@" || code=$?
  cp benchmarks/results/*.json benchmarks/results/*.png "$out" 2> /dev/null
  return $code
}

step_bench() {
  local tests=''
  [ ! -f "$out/tests.xml" ] || tests="--tests $out/tests.xml"
  # shellcheck disable=SC2086
  measure benchmarks/attention.py --budget-seconds "$budget" $tests $bench_args
}

step_lengths() { measure benchmarks/lengths.py --causal both; }

step_memory() { measure benchmarks/memory.py --out benchmarks/results; }

step_sparse() { measure benchmarks/sparse.py; }

# Runs a step with its limit; what it prints goes to the screen and to a log.
run() {
  local name=$1 began=$SECONDS code=0 word
  echo "== $name (at most ${limit[$name]} s)"
  timeout --kill-after=15 "${limit[$name]}" bash -c "step_$name" 2>&1 \
    | tee "$out/$name.log" || code=$?
  case $code in
    0) word=passed ;;
    124 | 137) word="stopped at its limit of ${limit[$name]} s" ;;
    *) word="failed with status $code" ;;
  esac
  echo "$name: $word, $((SECONDS - began)) s" >> "$out/summary.txt"
  [ $code -eq 0 ] && return
  status=1
  grep -E '^(FAILED|ERROR) ' "$out/$name.log" | head -n 40 | sed 's/^/  /' >> "$out/summary.txt"  # which tests
  return $code
}

budget=$((limit[bench] * 4 / 5)) # the rest is for the measurement in progress
export python out archs pytest_args bench_args budget
export -f measure "${steps[@]/#/step_}"
: > "$out/summary.txt"
status=0
for name in "${steps[@]}"; do
  [ -n "${wanted[$name]:-}" ] || continue
  run "$name" || [ "$name" != build ] || break
done
echo "== summary ($out)"
cat "$out/summary.txt"
exit $status
