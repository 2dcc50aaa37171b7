#!/usr/bin/env bash
# A selection of the GPU tests under compute-sanitizer, about two minutes of one GPU: memory errors,
# and races in shared memory.
# usage: tests/cuda/sanitize.sh build/release/tests
set -euo pipefail
tests=${1:?usage: tests/cuda/sanitize.sh DIRECTORY_OF_THE_TESTS}
export STREAM_CQSA_TEST_SHARE=10 STREAM_CQSA_TEST_BACKEND=cuda

check() {
  echo "== $*"
  compute-sanitizer --error-exitcode 9 --print-limit 5 "$@" 2>&1 | tail -n 12
}

# Of the Hopper kernel's barriers racecheck knows too little.
for tool in 'memcheck' 'racecheck --kernel-name-exclude kns=attention_hopper'; do
  check --tool $tool "$tests/cuda/cuda_states_test"
  check --tool $tool "$tests/cuda/cuda_attention_test" --run_test='random_*'
  check --tool $tool "$tests/cuda/cuda_attention_non_finite_test" --run_test='random_*'
done
check --tool memcheck "$tests/engine/engine_run_test" --run_test='random_*,budgets_*'
check --tool memcheck "$tests/cuda/cuda_accumulators_test"
