#!/usr/bin/env bash
# Stands in for the program where its endings matter and not its work: takes the options of
# `stream-cqsa run`, runs until it is told to stop, then exits with 75; the next time it finishes.
#   STAND_IN=fail     exits with 1            STAND_IN=stubborn     exits with 75 each time, at once
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=$2 ;;
    --checkpoint) stopped=$2/stopped ;;
  esac
  shift
done
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-0}}
case ${STAND_IN:-} in
  fail) exit 1 ;;
  stubborn) exit 75 ;;
esac
if [ -e "$stopped" ]; then
  [ "$rank" -ne 0 ] || echo finished >"$output"
  exit 0
fi
# Only the master is told; it tells the others.
[ "$rank" -ne 0 ] || trap 'touch "$stopped"' TERM
touch "${stopped%/*}/started.$rank"
until [ -e "$stopped" ]; do sleep 0.1; done
exit 75
