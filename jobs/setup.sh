# Shared set-up, sourced: sees to the packages, the environment of Open MPI and a Python with numpy.

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# require_packages PACKAGE...: installs what is missing as root, or names the line that does.
# "a|b" asks for either; the first is the one that gets installed.
require_packages() {
  local wanted alternative missing=()
  command -v dpkg-query >/dev/null || return 0  # not Debian: CMake names what it does not find
  for wanted in "$@"; do
    for alternative in ${wanted//|/ }; do
      installed "$alternative" && continue 2
    done
    missing+=("${wanted%%|*}")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  [ "$(id -u)" -eq 0 ] || fail "packages are missing; run: sudo apt-get update && sudo apt-get install -y ${missing[*]}"
  echo "Installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >/dev/null || fail "apt-get update failed"
  apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null ||
    fail "apt-get install failed; run: apt-get install -y ${missing[*]}"
}

build_packages=(g++ cmake ninja-build libopenmpi-dev openmpi-bin libboost-program-options-dev
                nlohmann-json3-dev libfmt-dev libhwy-dev
                "libopenblas-pthread-dev|libopenblas-openmp-dev")

# The first Python that imports numpy: one that stands before the system's may lack it.
python_with_numpy() {
  local candidate
  for candidate in python3 /usr/bin/python3; do
    "$candidate" -c 'import numpy' 2>/dev/null && { echo "$candidate"; return; }
  done
  fail "no python3 imports numpy; run: apt-get install -y python3-numpy"
}

# Compiles through ccache where there is one.
if command -v ccache >/dev/null; then
  export CCACHE_SLOPPINESS="${CCACHE_SLOPPINESS-pch_defines,time_macros}"  # precompiled headers
  export CMAKE_CXX_COMPILER_LAUNCHER="${CMAKE_CXX_COMPILER_LAUNCHER-ccache}"
  export CMAKE_CUDA_COMPILER_LAUNCHER="${CMAKE_CUDA_COMPILER_LAUNCHER-ccache}"
fi

# Open MPI refuses root and more ranks than cores, and its shared-memory copy warns in containers.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1
# It also binds a single rank to one core, and the rank's threads with it.
export OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_btl_vader_single_copy_mechanism="${OMPI_MCA_btl_vader_single_copy_mechanism-none}"

# cuda_option OTHERWISE: CUDA takes minutes to compile. Where there is a device it is built for that
# one alone; otherwise as the argument says.
cuda_option() {
  if nvidia-smi -L >/dev/null 2>&1; then
    echo -DCMAKE_CUDA_ARCHITECTURES=native
  else
    echo "$1"
  fi
}
