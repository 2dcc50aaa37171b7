# A Slurm of two nodes, both on this machine, in a folder of its own; sourced. Nothing of the system's
# configuration is read or written, and another Slurm or munge beside it is not disturbed.
#   start_cluster FOLDER TASKS   each node has room for TASKS tasks, whatever cores there are, and
#                                claims as many GPUs
#   stop_cluster                 ends its jobs and what start_cluster started
cluster_pids=()

# start_daemon NAME COMMAND...: in the foreground of a background job, so that its id is known.
start_daemon() {
  local name=$1
  shift
  "$@" >"$cluster/$name.out" 2>&1 &
  cluster_pids+=($!)
}

# wait_until SECONDS COMMAND...: false when the command has not succeeded by then.
wait_until() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}

write_slurm_conf() {
  cat >"$cluster/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=26817
AuthType=auth/munge
AuthInfo=socket=$cluster/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/%n/spool
TmpFS=$cluster/%n/tmp
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/%n/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=pmix
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MinJobAge=86400
SchedulerParameters=batch_sched_delay=0,sched_interval=2
GresTypes=gpu
NodeName=n1 NodeHostname=localhost Port=26818 CPUs=$1 RealMemory=1000000 Gres=gpu:8
NodeName=n2 NodeHostname=localhost Port=26819 CPUs=$1 RealMemory=1000000 Gres=gpu:8
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
  touch "$cluster"/gpu{0..7}
  echo "Name=gpu File=$cluster/gpu[0-7]" >"$cluster/gres.conf"
}

nodes_respond() {
  timeout 5 sinfo >/dev/null 2>&1
}

nodes_are_idle() {
  [ "$(timeout 5 sinfo --noheader --format %T)" = idle ]
}

start_cluster() {
  cluster=$1
  # The nodes have one /dev/shm, in which Open MPI's shared memory of both would meet.
  export OMPI_MCA_btl=self,tcp OMPI_MCA_btl_tcp_if_include=lo
  mkdir -p "$cluster/state" "$cluster"/n{1,2}/{spool,tmp}
  chmod 755 "$cluster"
  write_slurm_conf "$2"
  export SLURM_CONF=$cluster/slurm.conf
  dd if=/dev/urandom of="$cluster/munge.key" bs=128 count=1 status=none
  chmod 400 "$cluster/munge.key"
  start_daemon munged munged --foreground --key-file="$cluster/munge.key" \
    --socket="$cluster/munge.socket" --pid-file="$cluster/munged.pid" \
    --seed-file="$cluster/munge.seed"
  wait_until 10 test -S "$cluster/munge.socket" ||
    fail "munged did not start: $(tail -n 3 "$cluster/munged.out")"
  start_daemon slurmctld slurmctld -D -f "$SLURM_CONF"
  start_daemon slurmd1 slurmd -D -N n1 -f "$SLURM_CONF"
  start_daemon slurmd2 slurmd -D -N n2 -f "$SLURM_CONF"
  wait_until 15 nodes_are_idle || fail "Slurm did not start: $(tail -q -n 3 "$cluster"/slurm*.out)"
}

stop_cluster() {
  [ ${#cluster_pids[@]} -eq 0 ] && return 0
  if nodes_respond; then
    scancel --user="$(id -un)" || true
    wait_until 15 nodes_are_idle || true
  fi
  kill "${cluster_pids[@]}" 2>/dev/null || true
  wait "${cluster_pids[@]}" 2>/dev/null || true
  cluster_pids=()
}
