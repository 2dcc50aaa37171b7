#!/usr/bin/env python3
"""One JSON line of a scaling study, from the report of a run.

Keys: label, ranks, workers, gpus (0 on CPUs), n, heads, dim, dtype, causal, chunks, seconds, total_seconds,
stages, master, workers_detail (both null where one rank did everything), resumed_from (the share of the scores,
null without a checkpoint), checksum, commit, date; statuses where the run was disturbed: the exit status of each start.
"""

import argparse
import fcntl
import json
import pathlib


def line_of(report, label, ranks):
    """The line's dictionary; seconds are those of the report."""
    plan = report["plan"]
    problem = plan["problem"]
    workers = max(1, ranks - 1)
    return {
        "label": label,
        "ranks": ranks,
        "workers": workers,
        "gpus": workers if plan["request"]["device"]["kind"] == "cuda" else 0,
        "n": problem["query_length"],
        "heads": problem["query_heads"],
        "dim": problem["head_dim"],
        "dtype": problem["dtype"],
        "causal": problem["mask"] == "causal",
        "chunks": plan["c"],
        "seconds": report["seconds"],
        "total_seconds": report["total_seconds"],
        "stages": report["stages"],
        "master": report.get("master"),
        "workers_detail": report.get("workers"),
        "resumed_from": (report.get("checkpoint") or {}).get("resumed_from"),
        "checksum": report["certificate"]["output"]["checksum"],
        "commit": report["versions"]["commit"],
        "date": report["date"],
    }


def append(path, line):
    """Under a lock: the elements of a job array end at any time, on any node."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(line + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", required=True, type=pathlib.Path, help="of stream-cqsa run --report")
    parser.add_argument("--label", required=True, help="one name for the runs that make a curve")
    parser.add_argument("--ranks", required=True, type=int)
    parser.add_argument("--seconds", type=float, help="instead of the report's, of a run in several parts")
    parser.add_argument("--statuses", type=int, nargs="+", help="exit statuses of the parts")
    parser.add_argument("--append", help="file to append the line to, besides printing it")
    arguments = parser.parse_args()

    line = line_of(json.loads(arguments.report.read_text()), arguments.label, arguments.ranks)
    if arguments.seconds is not None:
        line["seconds"] = arguments.seconds
    if arguments.statuses:
        line["statuses"] = arguments.statuses
    text = json.dumps(line)
    if arguments.append:
        append(arguments.append, text)
    print(text)


if __name__ == "__main__":
    main()
