# Starting ranks, sourced: under Open MPI's mpirun or Slurm's srun, in a job or on one host without Slurm.
#   LAUNCH            mpirun or srun (default: srun in a Slurm job, else mpirun)
#   LAUNCH_OPTIONS    more options of the launcher, such as --with-ft ulfm: with it mpirun of Open MPI 5 lets
#                     a run go on without a worker that is lost, but without UCX (see ompi_info)
# Rank 0 is the master, the others are workers. With several nodes the first one holds the master
# besides its workers, and a node is filled before the next one is begun.
# Where a script that sources this has a failure of its own, that one is used.
declare -F fail >/dev/null || fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

# places_of RANKS: the host of each rank, one a line; a node takes ntasks-per-node - 1 workers.
places_of() {
  local left=$(($1 - 1)) workers=$((${SLURM_NTASKS_PER_NODE:-1} - 1)) host here
  local -a hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  [ $((workers * ${#hosts[@]})) -ge "$left" ] ||
    fail "$1 ranks do not fit ${#hosts[@]} nodes of $workers workers; raise --ntasks-per-node"
  echo "${hosts[0]}"
  for host in "${hosts[@]}"; do
    for ((here = 0; here < workers && left > 0; ++here, --left)); do
      echo "$host"
    done
  done
}

# launcher_of RANKS: sets the array `launcher`.
launcher_of() {
  local places='' more
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    places=$(places_of "$1") || exit 1
  fi
  case ${LAUNCH:=$([ -n "${SLURM_JOB_ID:-}" ] && echo srun || echo mpirun)} in
    mpirun)
      # Each rank has threads for several cores; bound to one, they would share it.
      launcher=(mpirun -n "$1" --map-by slot --bind-to none)
      [ -z "$places" ] ||
        launcher+=(--host "$(uniq -c <<<"$places" | awk '{ print $2 ":" $1 }' | paste -s -d ,)")
      ;;
    srun)
      # When a rank dies the others get SIGTERM: rank 0 writes a checkpoint and ends within seconds.
      launcher=(srun -n "$1" --mpi=pmix --cpu-bind=none --export=ALL --kill-on-bad-exit=1)
      # Since Slurm 22.05 not inherited from sbatch.
      [ -z "${SLURM_CPUS_PER_TASK:-}" ] || launcher+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
      if [ -n "$places" ]; then
        launcher+=(--distribution=arbitrary --nodelist="$(paste -s -d , <<<"$places")")
        launcher=(env -u SLURM_NTASKS_PER_NODE "${launcher[@]}")  # it does not fit these places
      fi
      ;;
    *) fail "LAUNCH=$LAUNCH: unknown launcher; use mpirun or srun" ;;
  esac
  read -r -a more <<<"${LAUNCH_OPTIONS:-}"
  launcher+=("${more[@]}")
}

# start RANKS COMMAND...: in the background; sets launch_pid.
start() {
  launcher_of "$1"
  shift
  # By this mark the ranks are known from those of other runs on the node.
  export STREAM_CQSA_LAUNCH=$$.$((launches = ${launches:-0} + 1))
  "${launcher[@]}" "$@" &
  launch_pid=$!
}

# pids_of_rank RANK: of that rank of the last start, if it runs on this node; false if not.
pids_of_rank() {
  local pids
  # Processes that end meanwhile are no failure.
  pids=$(grep -lzxs "STREAM_CQSA_LAUNCH=$STREAM_CQSA_LAUNCH" /proc/[0-9]*/environ |
    xargs -r grep -lzxsE "(OMPI_COMM_WORLD_RANK|PMIX_RANK|PMI_RANK)=$1" | cut -d / -f 3) || true
  [ -n "$pids" ] && echo "$pids"
}

# signal_rank SIGNAL RANK: to that rank of the last start, if it runs on this node; false if not.
# Not to the launcher: told to end, mpirun kills its ranks a second later and srun kills them at
# once, and neither would then return the program's exit status. A wrapper between launcher and
# program has to exec the program, or it gets the signal too.
signal_rank() {
  local pids
  pids=$(pids_of_rank "$2") && kill -s "$1" $pids
}
