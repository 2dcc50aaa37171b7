#!/usr/bin/env bash
# Runs a program that can be stopped and continued as the work of a Slurm batch job:
#   exec bash jobs/resumable.sh RANKS PROGRAM ARGUMENT...      at the end of a batch script
# USR1 (sbatch --signal=B:USR1@SECONDS, before the time limit) and TERM (preemption) are passed to
# rank 0 as TERM: it writes a checkpoint and the program exits with 75. The job is then put back in
# the queue, and the same command continues from the checkpoint. So it is when a rank was killed, if
# the checkpoint has grown since the job was started.
#   MAX_RESTARTS      how often at most (default 50): a cause that stays would stop every run
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
resumable=75
killed_by_term=143

say() {
  echo "[$(date +%FT%T) job $SLURM_JOB_ID] $1" >&2
}

stops=0  # how often the job was asked to stop
stop_program() {
  stops=$((stops + 1))
  say "asked to stop: telling rank 0 to write a checkpoint"
  # That may come before the ranks are up.
  until signal_rank TERM 0; do
    kill -0 "$launch_pid" 2>/dev/null || return 0
    sleep 1
  done
}

# Sets status. A signal ends `wait`, not the program.
wait_for_program() {
  local before
  while true; do
    before=$stops
    wait "$launch_pid"
    status=$?
    [ "$before" -eq "$stops" ] && return 0
  done
}

# checkpoint_of ARGUMENT...: what the journals below the folder of --checkpoint hold, in words that
# change when they grow.
checkpoint_of() {
  local folder=''
  while [ $# -gt 0 ]; do
    case $1 in
      --checkpoint) folder=${2:-} ;;
      --checkpoint=*) folder=${1#*=} ;;
    esac
    shift
  done
  [ -d "$folder" ] && find "$folder" -name journal -printf '%p %s\n' | sort
}

# Not for a job that was cancelled, or that Slurm itself has put back: those are "COMPLETING".
continue_later() {
  local restarts=${SLURM_RESTART_COUNT:-0}
  [ "$(squeue --noheader --format %T --jobs "$SLURM_JOB_ID" 2>/dev/null)" = RUNNING ] || return 0
  if [ "$restarts" -ge "${MAX_RESTARTS:-50}" ]; then
    say "not queued again after $restarts restarts; sbatch the same file to continue"
    return 0
  fi
  say "stopped with its work kept: back in the queue, restart $((restarts + 1))"
  scontrol requeue "$SLURM_JOB_ID"
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a Slurm job; sbatch a file that ends by calling this"
[ $# -ge 2 ] || fail "wrong usage; give RANKS PROGRAM ARGUMENT..."
say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $1 ranks of $2"
kept_before=$(checkpoint_of "$@")
start "$@"
trap stop_program USR1 TERM
wait_for_program
trap '' TERM USR1  # a job that is put back in the queue gets them
if [ $status -eq $resumable ] || { [ $stops -gt 0 ] && [ $status -eq $killed_by_term ]; }; then
  continue_later
elif [ $status -gt 128 ]; then
  if [ "$(checkpoint_of "$@")" != "$kept_before" ]; then
    continue_later
  else
    say "not queued again: it was killed, and its checkpoint has not grown"
  fi
fi
say "exit status $status"
exit $status
