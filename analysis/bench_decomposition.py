#!/usr/bin/env python3
"""What dividing costs: the same problem at several c, in turn, by `stream-cqsa run`.

For each c: the scores computed (the arithmetic really done), the wall clock and the kernel's time as a
ratio to c = 1, each the median of several rounds, after warm-up rounds, in which every c runs once. Writes JSON
and prints a table.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

import result_file


def run(arguments, c, report):
    """One run; returns its report."""
    command = [arguments.program, "run", "--input", "synthetic:1", "--shape",
               f"1,{arguments.length},{arguments.heads},{arguments.dim}", "--chunks", str(c),
               "--heads-per-group", str(arguments.heads), "--dtype", arguments.dtype,
               "--output", str(report.with_suffix(".npy")), "--overwrite", "--report", str(report),
               "--device-memory", "4GiB", "--host-memory", "4GiB", "--quiet", "--no-verify"]
    if arguments.causal:
        command.append("--causal")
    subprocess.run(command, check=True)
    return json.loads(report.read_text())


def summarise(reports, c, base):
    """The medians of one c's runs, beside those of c = 1."""
    median = lambda of: statistics.median(of(report) for report in reports)
    row = {"c": c,
           "scores_computed": reports[0]["scores_computed"],
           "seconds": median(lambda r: r["seconds"]),
           "compute_seconds": median(lambda r: r["stages"]["compute"]["busy_seconds"]),
           "flop_per_second": median(lambda r: r["flop_per_second"])}
    base = base or row
    row["seconds_over_c1"] = row["seconds"] / base["seconds"]
    row["compute_over_c1"] = row["compute_seconds"] / base["compute_seconds"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/src/app/stream-cqsa")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 7, 31, 133], help="the first is the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--output", help="where to write the JSON")
    arguments = parser.parse_args()

    reports = {c: [] for c in arguments.chunks}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.warm_up + arguments.rounds):
            for c in arguments.chunks:
                report = run(arguments, c, pathlib.Path(folder) / "report.json")
                if number >= arguments.warm_up:
                    reports[c].append(report)
    rows = []
    for c in arguments.chunks:
        rows.append(summarise(reports[c], c, rows[0] if rows else None))
    print(f"{'c':>5} {'scores computed':>16} {'seconds':>8} {'over c=1':>9} {'kernel over c=1':>16} {'GFLOP/s':>8}")
    for row in rows:
        print(f"{row['c']:>5} {row['scores_computed']:>16} {row['seconds']:>8.2f} {row['seconds_over_c1']:>9.3f} "
              f"{row['compute_over_c1']:>16.3f} {row['flop_per_second'] * 1e-9:>8.1f}")
    if arguments.output:
        one = reports[arguments.chunks[0]][0]
        result = {"versions": one["versions"], "date": one["date"], "rounds": arguments.rounds,
                  "options": {key: value for key, value in vars(arguments).items() if key not in ("program", "output")},
                  "rows": rows}
        result_file.write(arguments.output, result)


if __name__ == "__main__":
    main()
