#!/usr/bin/env bash
# Builds everything and runs every test, from any folder of a fresh Debian 12 or Ubuntu 24.04.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/setup.sh

require_packages "${build_packages[@]}" libboost-test-dev python3 python3-numpy
cmake --preset release -DSTREAM_CQSA_TESTS=ON -DSTREAM_CQSA_WERROR=ON -DSTREAM_CQSA_CUDA=AUTO \
  "$(cuda_option -DCMAKE_CUDA_ARCHITECTURES=90)"
cmake --build --preset release -j "$(nproc)"
# Who waits has a third of the random trials; CI has all.
export STREAM_CQSA_TEST_SHARE="${STREAM_CQSA_TEST_SHARE-3}"
# Two more than there are cores: tests of several ranks wait a good part of their time.
# ctest's closing lines come last: failures are printed with their output, then the summary.
ctest --preset release -j "$(($(nproc) + 2))"
