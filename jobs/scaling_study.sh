#!/usr/bin/env bash
# The scaling study: one JSON line a run (keys: jobs/scaling_line.py), for analysis/plot_scaling.py.
# On one host by itself; in a Slurm job array through jobs/scaling_study.sbatch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A cluster has its own settings of Open MPI.
[ -n "${SLURM_JOB_ID:-}" ] || source "$root/jobs/setup.sh"
source "$root/jobs/launch.sh"

usage() {
  cat <<END
usage: bash jobs/scaling_study.sh [OPTION...]
  --results FILE          where lines are appended (default: build/scaling/results.jsonl)
  --counts LIST           GPUs, or CPU workers (default: 1,2,4,8); 1 is one rank that does everything,
                          more are as many workers and a master
  --list                  the runs by number; runs nothing
  --only NUMBER           that run alone
  --deadline SECONDS      starts no run later than this; says which are left out
  --program FILE          default: build/release/src/app/stream-cqsa
  --backend NAME          default: cuda
  --device-memory BYTES   of each worker (default: 4GiB)
  --host-memory BYTES     of each rank (default: 32GiB)
  --options 'OPTION...'   more options of stream-cqsa run
  --shrink F              divides every sequence length by F (default: 1)
  --chunks C              instead of each problem's own
  --checkpoint-interval SECONDS   of the run whose worker is killed (default: 1)
  --kill-after SECONDS    from the first checkpoint to the killing of a worker (default: 1)
  --work DIR              for inputs, outputs and checkpoints, which are removed: in memory, or with
                          room in the page cache (default: /dev/shm or TMPDIR)
END
}

results=$root/build/scaling/results.jsonl
counts=1,2,4,8
list=false
only=
deadline=
program=$root/build/release/src/app/stream-cqsa
backend=cuda
device_memory=4GiB
host_memory=32GiB
options=
shrink=1
chunks=
interval=1
kill_after=1
work=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --list) list=true; shift; continue ;;
  esac
  [ $# -ge 2 ] || { usage >&2; exit 2; }
  case $1 in
    --results) results=$2 ;;
    --counts) counts=$2 ;;
    --only) only=$2 ;;
    --deadline) deadline=$2 ;;
    --program) program=$2 ;;
    --backend) backend=$2 ;;
    --device-memory) device_memory=$2 ;;
    --host-memory) host_memory=$2 ;;
    --options) options=$2 ;;
    --shrink) shrink=$2 ;;
    --chunks) chunks=$2 ;;
    --checkpoint-interval) interval=$2 ;;
    --kill-after) kill_after=$2 ;;
    --work) work=$2 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift 2
done
counts=${counts//,/ }

# Of each problem: study, length, heads, dimension, type, mask, chunks, heads a group. Chunks and
# groups are fixed, so that every count runs one plan and gives the same bits, and chosen so that
# 8 workers share the subproblems evenly. The cheap ones come first.
problems="
strong 1048576 8 64 f16 causal 57 1
strong 1048576 8 128 bf16 full 57 1
weak 2097152 8 64 f16 causal 57 1
killed 4194304 8 64 f16 causal 73 1
strong 4194304 8 64 f16 causal 73 1
strong 16777216 1 64 f16 causal 183 1
"

# every_run: study, length, heads, dimension, type, mask, chunks, heads a group, count; one a line.
every_run() {
  local study n rest count
  while read -r study n rest; do
    [ -n "$study" ] || continue
    n=$((n / shrink))
    for count in $counts; do
      case $study in
        strong) echo "$study $n $rest $count" ;;
        # The work is N * N: as much for each worker. Whole tiles of 128 tokens.
        weak) awk -v n=$n -v r="$count" -v rest="$rest" \
          'BEGIN { print "weak", int(n * sqrt(r) / 128 + 0.5) * 128, rest, r }' ;;
      esac
    done
    [ "$study" != killed ] || echo "$study $n $rest ${counts##* }"
  done <<<"$problems"
}

# label_of STUDY LENGTH HEADS DIM TYPE MASK...: one name for the runs that make a curve.
label_of() {
  local problem="H=$3 D=$4 $5 $6"
  case $1 in
    strong) echo "strong N=$2 $problem" ;;
    weak) echo "weak $problem" ;;
    killed) echo "worker killed and resumed N=$2 $problem" ;;
  esac
}

# Beyond a journal's header there are records: something has been made durable.
checkpoint_begun() {
  [ -n "$(find "$work/checkpoint" -name journal -size +32c | head -n 1)" ]
}

# disturbed_run RANKS COMMAND...: a worker is killed, then the same command continues until it ends
# well. Sets statuses, the exit status of each start.
disturbed_run() {
  local status victim
  start "$@"
  # Found before, as to find it takes a while.
  until victim=$(pids_of_rank $(($1 > 1))) || ! kill -0 $launch_pid 2>/dev/null; do sleep 0.05; done
  until checkpoint_begun || ! kill -0 $launch_pid 2>/dev/null; do sleep 0.05; done
  sleep "$kill_after"
  kill -s KILL $victim 2>/dev/null || fail "the run ended before its worker was killed; lower --kill-after or --checkpoint-interval"
  statuses=()
  while true; do
    status=0
    wait $launch_pid || status=$?
    statuses+=("$status")
    [ $status -ne 0 ] || return 0
    [ ${#statuses[@]} -lt 4 ] || fail "the run does not resume: exit statuses ${statuses[*]}"
    start "$@"
  done
}

# inputs_of LENGTH HEADS DIM TYPE: sets the array `inputs` to the options for files in the work folder,
# head by head, as each GPU reads the heads that it takes; those of the last run where they are the same.
inputs_of() {
  local kind="$1,$2,$3 $4"
  inputs=(--input "$work/inputs.safetensors" --layout bhsd)
  [ "${inputs_kind:-}" != "$kind" ] || return 0
  start 1 "$program" generate --shape "1,$1,$2,$3" --dtype "$4" "${inputs[@]/--input/--output}" --overwrite
  wait $launch_pid || fail "no inputs of $kind in $work; --work names a folder with more room"
  inputs_kind=$kind
}

# one_run STUDY LENGTH HEADS DIM TYPE MASK CHUNKS GROUP COUNT
one_run() {
  # One worker needs no master beside it.
  local ranks=$(($9 > 1 ? $9 + 1 : 1)) begin
  local -a command more line inputs
  read -r -a more <<<"$options"
  inputs_of "$2" "$3" "$4" "$5"
  begin=$EPOCHREALTIME
  command=("$program" run "${inputs[@]}" --backend "$backend" --chunks "${chunks:-$7}"
    --heads-per-group "$8" --device-memory "$device_memory" --host-memory "$host_memory"
    --output "$work/o.safetensors" --report "$work/report.json" --overwrite --no-verify --quiet
    "${more[@]}")
  [ "$6" != causal ] || command+=(--causal)
  line=(--label "$(label_of "$@")" --ranks $ranks --report "$work/report.json" --append "$results")
  if [ "$1" = killed ]; then
    mkdir "$work/checkpoint"
    disturbed_run $ranks "${command[@]}" --checkpoint "$work/checkpoint" --checkpoint-interval "$interval"
    # From the first start to the end, with the time in which nothing ran.
    line+=(--seconds "$(awk "BEGIN { print $EPOCHREALTIME - $begin }")" --statuses "${statuses[@]}")
  else
    start $ranks "${command[@]}"
    wait $launch_pid || fail "$ranks ranks, $(label_of "$@"): the run failed"
  fi
  python3 "$root/jobs/scaling_line.py" "${line[@]}"
  rm -rf "$work"/{o.safetensors,report.json,checkpoint}
}

mapfile -t runs < <(every_run)
if $list; then
  for number in "${!runs[@]}"; do echo "$number ${runs[number]}"; done
  exit 0
fi
[ -x "$program" ] || fail "$program: not built; bash jobs/demo.sh builds it"
[ -z "$only" ] || [ -n "${runs[only]:-}" ] ||
  fail "--only $only: there are ${#runs[@]} runs, from 0; see --list"
mkdir -p "$(dirname "$results")"
[ -n "$work" ] || { [ -w /dev/shm ] && work=/dev/shm || work=${TMPDIR:-/tmp}; }
work=$(mktemp -d "$work/scaling.XXXXXX")
trap 'rm -rf "$work"' EXIT
for number in ${only:-"${!runs[@]}"}; do
  if [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ]; then
    echo "left out: $number ${runs[number]}" >&2
    continue
  fi
  one_run ${runs[number]}
done
