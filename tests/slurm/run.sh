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
  echo "The last lines of each log in $work:"
  tail -n 6 "$work"/*/*.log "$work"/cluster/n?/*.log | cut -c 1-160 || true
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

# Of a run that has got somewhere: states of 256 KiB at least, not just a first record.
checkpoint_filled() {
  [ "$(du --summarize --block-size=1K "$work/$1/checkpoint" | cut -f 1)" -ge 256 ]
}

await_checkpoint() {
  wait_until 60 checkpoint_filled "$1" || fail "job $1 wrote no checkpoint"
}

two_workers_a_node=(--ntasks-per-node=3 --cpus-per-task=1)

test_undisturbed() {
  local launcher single multi
  use_problem small
  for launcher in mpirun srun; do
    export LAUNCH=$launcher
    single=$(submit "single-$launcher" single_node.sbatch)
    multi=$(submit "multi-$launcher" multi_node.sbatch "${two_workers_a_node[@]}")
    expect_end "$single" COMPLETED
    same_bytes "single-$launcher" small
    ok "single_node.sbatch, $launcher"
    expect_end "$multi" COMPLETED
    same_bytes "multi-$launcher" small
    ok "multi_node.sbatch, $launcher: a master and 4 workers on 2 nodes"
  done
}

# disturb NAME LAUNCHER FILE COMMAND: submits, and in mid-run gives COMMAND the job; sets job.
disturb() {
  local name=$1 file=$3 command=$4
  local -a places=()
  [ "$file" != multi_node.sbatch ] || places=("${two_workers_a_node[@]}")
  job=$(LAUNCH=$2 submit "$name" "$file" "${places[@]}")
  await_checkpoint "$name"
  $command "$job"
}

# kill_worker JOB: rank 2 of its program.
kill_worker() {
  local pids
  pids=$(grep -lzxs "SLURM_JOB_ID=$1" /proc/[0-9]*/environ |
    xargs -r grep -lzxsE "(OMPI_COMM_WORLD_RANK|PMIX_RANK)=2" | cut -d / -f 3) || true
  kill -KILL $pids || fail "job $1 has no rank 2 to kill"
}

expect_resumed() {
  expect_end "$2" COMPLETED
  expect_restarts "$2" 1
  same_bytes "$1" long
}

# While one job waits to start again the next is disturbed.
test_disturbed() {
  local stop="scancel --batch --signal=USR1" launcher job single multi requeued cancelled
  local -A killed
  use_problem long
  disturb stopped-single mpirun single_node.sbatch "$stop"; single=$job
  disturb stopped-multi srun multi_node.sbatch "$stop"; multi=$job
  disturb requeued mpirun multi_node.sbatch "scontrol requeue"; requeued=$job
  for launcher in mpirun srun; do
    disturb "killed-$launcher" "$launcher" multi_node.sbatch kill_worker; killed[$launcher]=$job
  done
  disturb cancelled srun single_node.sbatch scancel; cancelled=$job
  expect_resumed stopped-single "$single"
  ok "single_node.sbatch, mpirun: asked to stop in mid-run, back in the queue by itself, finished"
  expect_resumed stopped-multi "$multi"
  ok "multi_node.sbatch, srun: asked to stop in mid-run, back in the queue by itself, finished"
  expect_resumed requeued "$requeued"
  ok "multi_node.sbatch, mpirun: ended by Slurm as if a node had failed, finished"
  for launcher in mpirun srun; do
    expect_resumed "killed-$launcher" "${killed[$launcher]}"
    ok "multi_node.sbatch, $launcher: a worker killed in mid-run, back in the queue by itself, finished"
  done
  expect_end "$cancelled" CANCELLED
  expect_restarts "$cancelled" 0
  [ ! -e "$work/cancelled/o.npy" ] || fail "a cancelled job left an output"
  job=$(LAUNCH=srun submit cancelled single_node.sbatch)
  expect_end "$job" COMPLETED
  same_bytes cancelled long
  ok "single_node.sbatch, srun: cancelled in mid-run, stayed so; submitted again, finished"
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

# The whole study, tiny, as a job array: a line a run, and one checksum a problem.
test_scaling_study() {
  local runs results=$work/study/results.jsonl
  local -a tiny=(--backend cpu --counts 1,2 --shrink 256 --chunks 7 --device-memory 32MiB
    --host-memory 128MiB --checkpoint-interval 0.05 --kill-after 0)
  runs=$(bash "$root/jobs/scaling_study.sh" "${tiny[@]}" --list | wc -l)
  STUDY_OPTIONS="${tiny[*]}" RESULTS=$results LAUNCH=srun submit study scaling_study.sbatch \
    --array="0-$((runs - 1))" --ntasks-per-node=3 --cpus-per-task=1 --open-mode=append --wait >/dev/null ||
    fail "a run of the study failed"
  python3 "$root/tests/slurm/check_study.py" "$results" "$runs" || fail "the study's lines are wrong"
  ok "scaling_study.sbatch: $runs runs, a line each, the same bits for every count"
}

start_cluster "$work/cluster" 64
export RESOURCES="--device-memory 16MiB --host-memory 64MiB"
export OPTIONS="--causal --backend cpu --threads 1 --chunks 31"
submit_stand_ins
make_problem small 1,8192,2,64
make_problem long 1,32768,2,64
OPTIONS+=" --checkpoint-interval 1"
test_undisturbed
test_disturbed
test_scaling_study
test_stand_ins
echo "$passed passed, 0 failed"
