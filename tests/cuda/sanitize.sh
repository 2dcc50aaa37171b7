#!/usr/bin/env bash
# The small GPU tests under compute-sanitizer: memory errors, and races in shared memory.
# usage: tests/cuda/sanitize.sh DIRECTORY_OF_THE_TEST_PROGRAMS
set -euo pipefail
programs=${1:?usage: tests/cuda/sanitize.sh DIRECTORY_OF_THE_TEST_PROGRAMS}

check() {
  echo "== $*"
  compute-sanitizer --error-exitcode 9 --print-limit 5 "$@" 2>&1 | tail -n 12
}

for tool in memcheck racecheck; do
  check --tool "$tool" "$programs/cuda_states_test"
  check --tool "$tool" "$programs/cuda_attention_test" --run_test='*random*,*policy*'
  check --tool "$tool" "$programs/cuda_attention_non_finite_test" --run_test='*hidden*'
done
check --tool memcheck "$programs/cuda_engine_run_test"
check --tool memcheck "$programs/cuda_accumulators_test"
