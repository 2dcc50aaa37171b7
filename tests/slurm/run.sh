#!/usr/bin/env bash
# Submits every batch file of jobs/ to a real Slurm, started here, and compares the outputs' bytes
# with a plain run's: both launchers; jobs that are stopped, put back, killed and submitted again.
# Needs root, and a built program: bash tests/slurm/run.sh [BUILD_DIR (default: build/release)]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/jobs/setup.sh"
source "$root/tests/slurm/cluster.sh"
build=$(realpath "${1:-$root/build/release}")
export ROOT=$root PROGRAM=$build/src/app/stream-cqsa
[ "$(id -u)" -eq 0 ] || fail "needs root: it starts Slurm's daemons"
[ -x "$PROGRAM" ] || fail "$PROGRAM: not built; run bash tests/run.sh"
require_packages slurm-wlm munge python3

work=$(mktemp -d /tmp/slurm-test.XXXXXX)
chmod 755 "$work"  # munged insists on a socket that all can reach
passed=0

tear_down() {
  local status=$?
  stop_cluster
  if [ $status -eq 0 ]; then
    rm -rf "$work"
    return
  fi
  # What the failed jobs and the daemons said last; a job's folder has its log.
  tail -n 20 "$work"/*/*.log "$work"/cluster/*.log "$work"/cluster/n?/*.log 2>/dev/null || true
}
trap tear_down EXIT

ok() {
  passed=$((passed + 1))
  echo "ok $passed, ${SECONDS}s: $1"
}

# job_field JOB NAME: of scontrol show job, such as JobState, Restarts or ExitCode.
job_field() {
  scontrol show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1
}

job_is() {
  [[ "$(job_field "$1" JobState)" = "$2" ]]
}

ended() {
  [[ "$(job_field "$1" JobState)" =~ COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL ]]
}

# expect_end JOB STATE: waits for the end.
expect_end() {
  wait_until 150 ended "$1" || fail "job $1 did not end: $(job_field "$1" JobState)"
  job_is "$1" "$2" || fail "job $1 ended $(job_field "$1" JobState), not $2"
}

expect_restarts() {
  [ "$(job_field "$1" Restarts)" -eq "$2" ] ||
    fail "job $1 was put back $(job_field "$1" Restarts) times, not $2"
}

# submit NAME FILE [SBATCH_OPTION...]: a job in a folder of its own; prints its id.
submit() {
  local folder=$work/$1 file=$root/jobs/$2
  shift 2
  mkdir -p "$folder"
  OUTPUT=$folder/o.npy CHECKPOINT=$folder/checkpoint \
    sbatch --parsable --chdir="$folder" --output="$folder/job.log" "$@" "$file"
}

same_bytes() {
  cmp "$work/$1/o.npy" "$work/$2/o.npy" || fail "the output of $1 differs from $2"
}

# make_problem NAME SHAPE: inputs, and the output of a plain run as $work/NAME/o.npy.
make_problem() {
  local folder=$work/$1
  local -a files=(--query "$folder/q.npy" --key "$folder/k.npy" --value "$folder/v.npy")
  mkdir "$folder"
  mpirun -n 1 "$PROGRAM" generate --shape "$2" "${files[@]}"
  mpirun -n 1 "$PROGRAM" run "${files[@]}" $OPTIONS $RESOURCES --output "$folder/o.npy" --quiet
}

# use_problem NAME: what the jobs submitted from now on compute.
use_problem() {
  export INPUT="--query $work/$1/q.npy --key $work/$1/k.npy --value $work/$1/v.npy"
}

checkpoint_begun() {
  [ -n "$(find "$work/$1/checkpoint" -type f -size +0 2>/dev/null | head -n 1)" ]
}

await_checkpoint() {
  wait_until 60 checkpoint_begun "$1" || fail "$1 wrote no checkpoint"
}
two_workers_a_node=(--ntasks-per-node=3 --cpus-per-task=1)

test_undisturbed() {
  local launcher job
  use_problem small
  for launcher in mpirun srun; do
    job=$(LAUNCH=$launcher submit "single-$launcher" single_node.sbatch)
    expect_end "$job" COMPLETED
    same_bytes "single-$launcher" small
    ok "single_node.sbatch, $launcher"
    job=$(LAUNCH=$launcher submit "multi-$launcher" multi_node.sbatch "${two_workers_a_node[@]}")
    expect_end "$job" COMPLETED
    same_bytes "multi-$launcher" small
    ok "multi_node.sbatch, $launcher: master and 4 workers on 2 nodes"
  done
}

# Asked to stop, as before the time limit: puts itself back and finishes.
test_stopped() {
  local launcher=$1 file=$2 job name=stopped-$1-${2%.sbatch}
  shift 2
  job=$(LAUNCH=$launcher submit "$name" "$file" "$@")
  await_checkpoint "$name"
  scancel --batch --signal=USR1 "$job"
  expect_end "$job" COMPLETED
  expect_restarts "$job" 1
  same_bytes "$name" long
  ok "$file, $launcher: stopped in mid-run, back in the queue by itself, finished"
}

# Ended without warning and put back by Slurm, as after the failure of a node.
test_requeued() {
  local job
  job=$(LAUNCH=srun submit requeued multi_node.sbatch "${two_workers_a_node[@]}")
  await_checkpoint requeued
  scontrol requeue "$job"
  expect_end "$job" COMPLETED
  expect_restarts "$job" 1
  same_bytes requeued long
  ok "multi_node.sbatch, srun: put back by Slurm in mid-run, finished"
}

test_cancelled() {
  local job
  job=$(LAUNCH=mpirun submit cancelled single_node.sbatch)
  await_checkpoint cancelled
  scancel "$job"
  expect_end "$job" CANCELLED
  expect_restarts "$job" 0
  [ ! -e "$work/cancelled/o.npy" ] || fail "a cancelled job left an output"
  job=$(LAUNCH=mpirun submit cancelled single_node.sbatch)
  expect_end "$job" COMPLETED
  same_bytes cancelled long
  ok "single_node.sbatch, mpirun: cancelled in mid-run, not put back; submitted again, finished"
}

# Jobs whose program is a stand-in, that take their time beside the others.
submit_stand_ins() {
  local PROGRAM=$root/tests/slurm/stand_in.sh
  export PROGRAM
  # The least limit is a minute; Slurm sends the signal within the minute before the time named.
  limit=$(LAUNCH=srun submit limit multi_node.sbatch --time=1 --signal=B:USR1@30 "${two_workers_a_node[@]}")
  failing=$(STAND_IN=fail LAUNCH=mpirun submit failing single_node.sbatch)
  stubborn=$(STAND_IN=stubborn MAX_RESTARTS=1 LAUNCH=mpirun submit stubborn single_node.sbatch)
}

test_stand_ins() {
  expect_end "$failing" FAILED
  expect_restarts "$failing" 0
  ok "a program that fails is not put back"
  expect_end "$stubborn" FAILED
  expect_restarts "$stubborn" 1
  [ "$(job_field "$stubborn" ExitCode)" = 75:0 ] || fail "the last stop's exit status was lost"
  ok "MAX_RESTARTS ends what would stop for ever"
  expect_end "$limit" COMPLETED
  expect_restarts "$limit" 1
  ok "signalled by Slurm before the time limit, back in the queue by itself, finished"
}

# The whole study, tiny, as a job array: a line a run, the same bits for every count.
test_scaling_study() {
  local -a tiny=(--backend cpu --counts "1 2 4" --shrink 512 --chunks 7 --memory "--device-memory 2MiB --host-memory 64MiB")
  local last job
  last=$(($(bash "$root/jobs/scaling_study.sh" "${tiny[@]}" --list | wc -l) - 1))
  job=$(STUDY_OPTIONS="--backend cpu --counts 1,2,4 --shrink 512 --chunks 7 --device-memory 2MiB --host-memory 64MiB" \
    RESULTS=$work/study/results.jsonl submit study scaling_study.sbatch \
    --array="0-$last" --ntasks-per-node=5 --cpus-per-task=1)
}

start_cluster "$work/cluster" 64
export OPTIONS="--causal --backend cpu --threads 1 --chunks 31"
export RESOURCES="--device-memory 16MiB --host-memory 64MiB"
submit_stand_ins
make_problem small 1,8192,2,64
make_problem long 1,32768,4,64
test_undisturbed
use_problem long
test_stopped mpirun single_node.sbatch
test_stopped srun multi_node.sbatch "${two_workers_a_node[@]}"
test_stopped mpirun multi_node.sbatch "${two_workers_a_node[@]}"
test_requeued
test_cancelled
test_scaling_study
test_stand_ins
echo "$passed passed, 0 failed"
