#!/usr/bin/env python3
"""Cyclic quorum sets beside rectangular tiles: one problem at equal budgets, by `stream-cqsa run`.

The entries, several c of `--division cqs`, the c that the program chooses and its choice of tiles, run in
turn, so that all of them meet the same machine. Each time is the median of the rounds after the warm-up;
a c that does not fit a budget is listed with what the program says. Writes JSON and prints a table.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import result_file

KIB = 1024


def entries(chunks):
    """name -> options, the program's own choices last."""
    named = {f"cqs, c={c}": ["--division", "cqs", "--chunks", str(c)] for c in chunks}
    return {**named, "cqs": ["--division", "cqs"], "tiles": ["--division", "tiles"]}


def command_of(arguments, budget, ranks, options, folder):
    launcher = ["mpirun", "-n", str(ranks), *arguments.mpirun_options.split()] if ranks > 1 else []
    command = [*launcher, arguments.program, "run", "--input", "synthetic:1", "--shape", arguments.shape,
               "--dtype", arguments.dtype, "--layout", arguments.layout, "--backend", arguments.backend, *options,
               "--device-memory", budget, "--host-memory", arguments.host_memory,
               "--output", str(folder / "o.npy"), "--overwrite", "--report", str(folder / "report.json"),
               "--quiet", "--no-verify"]
    command += ["--kv-heads", str(arguments.kv_heads)] if arguments.kv_heads else []
    return command + ["--causal"] * arguments.causal


def run(command, folder):
    """The report of one run, or the line that says why there is none."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(report.read_text())
    lines = [line for line in done.stderr.splitlines() if line.startswith("stream-cqsa:")]
    return (lines or done.stderr.strip().splitlines() or ["ended without a word"])[-1]


def measured(report):
    """What is compared, of one run. Bytes in and out are those to and from the devices, of all ranks."""
    ranks = (report.get("workers") or []) + (report.get("mergers") or [])
    stages = report["stages"]
    return {"seconds": report["seconds"],
            "flop_per_second": report["flop_per_second"],
            "compute_seconds": stages["compute"]["busy_seconds"],
            "copy_in_seconds": stages["copy in"]["busy_seconds"],
            "copy_out_seconds": stages["copy out"]["busy_seconds"],
            "merge_seconds": stages["merge"]["busy_seconds"],
            "bytes_in": stages["copy in"]["bytes"],
            "bytes_out": stages["copy out"]["bytes"],
            "bytes_read": stages["read"]["bytes"],
            "scores_computed": report["scores_computed"],
            "device_bytes": report["memory"]["device"]["allocated"],
            "host_bytes": max([report["memory"]["host"]["allocated"]] + [rank["host_bytes"] for rank in ranks]),
            "peak_resident": max([report["memory"]["peak_resident"]] +
                                 [rank["peak_resident"] for rank in ranks if "peak_resident" in rank])}


def division_of(plan):
    """The plan's division: its own fields, and how many subproblems it gives."""
    kept = ("division", "c", "grid", "tile", "head_groups", "subproblem_count")
    return {**{key: plan[key] for key in kept if key in plan}, "accumulators": plan["accumulators"]["placement"]}


def summarise(name, budget, ranks, reports):
    """The medians of one entry's runs at one budget, and every run's time."""
    row = {"entry": name, "budget": budget, "ranks": ranks}
    errors = [report for report in reports if isinstance(report, str)]
    if errors:
        return {**row, "error": errors[0]}
    rounds = [measured(report) for report in reports]
    outputs = {report["certificate"]["output"]["checksum"] for report in reports}
    if len(outputs) > 1 or not all(report["certificate"]["ok"] for report in reports):
        return {**row, "error": "the runs of one division gave different outputs, or lacked scores"}
    medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {**row, **division_of(reports[0]["plan"]), **medians, "all_seconds": [one["seconds"] for one in rounds],
            "checksum": outputs.pop()}


def measure(arguments, folder):
    """(row, reports): of every budget and number of ranks, the entries in turn."""
    for ranks in arguments.ranks:
        for budget in arguments.budgets:
            taken = entries(arguments.chunks)
            reports = {name: [] for name in taken}
            for number in range(arguments.warm_up + arguments.rounds):
                for name, options in taken.items():
                    if any(isinstance(report, str) for report in reports[name]):
                        continue  # what does not fit once never does
                    report = run(command_of(arguments, budget, ranks, options, folder), folder)
                    if number >= arguments.warm_up or isinstance(report, str):
                        reports[name].append(report)
            for name in taken:
                yield summarise(name, budget, ranks, reports[name]), reports[name]


def size(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < KIB or unit == "GiB":
            return f"{count:.2f} {unit}" if unit == "GiB" else f"{count:.0f} {unit}"
        count /= KIB


def text_of(row):
    place = f"{row['budget']:>8} {row['ranks']:>5} {row['entry']:<12}"
    if "error" in row:
        return f"{place} {row['error']}"
    division = "x".join(map(str, row["grid"])) if "grid" in row else f"c={row['c']}"
    return (f"{place} {division:>9} {row['subproblem_count']:>8} {row['accumulators']:>6} {row['seconds']:>9.3f} "
            f"{row['flop_per_second'] * 1e-9:>9.1f} {size(row['bytes_in']):>10} {size(row['bytes_out']):>10} "
            f"{size(row['device_bytes']):>10} {size(row['host_bytes']):>10}")


HEADER = (f"{'budget':>8} {'ranks':>5} {'entry':<12} {'division':>9} {'subprob.':>8} {'accum.':>6} {'seconds':>9} "
          f"{'GFLOP/s':>9} {'bytes in':>10} {'bytes out':>10} {'device':>10} {'host':>10}")


def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/src/app/stream-cqsa")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--shape", default="1,65536,8,64", help="B,N,H,D")
    parser.add_argument("--kv-heads", type=int, help="default: as many as query heads")
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--layout", default="bshd",
                        help="with bhsd a rank generates no more heads than it computes")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--budgets", nargs="+", default=["64MiB", "256MiB", "1GiB"], help="of device memory")
    parser.add_argument("--host-memory", default="4GiB")
    parser.add_argument("--chunks", type=int, nargs="*", default=[7, 31, 133], help="c, beside the program's own")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="more than 1: under mpirun")
    parser.add_argument("--mpirun-options", default="", help="in one word, such as '--bind-to none'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--output", help="where to write the JSON")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1 or arguments.warm_up < 0 or min(arguments.ranks) < 1:
        parser.error("at least one round, one rank and no fewer than 0 warm-ups are needed")
    if any(not re.fullmatch(r"[\d.]+ ?[kKMGT]?i?B?", budget) for budget in arguments.budgets):
        parser.error(f"--budgets {' '.join(arguments.budgets)}: not amounts such as 256MiB or 1GiB")
    return arguments


def main(words=None):
    arguments = options(words)
    rows, good = [], []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for row, reports in measure(arguments, pathlib.Path(folder)):
            rows.append(row)
            good += [report for report in reports if not isinstance(report, str)][:1]
            print(text_of(row), flush=True)
    if not good:
        return 1
    if arguments.output:
        kept = {key: value for key, value in vars(arguments).items() if key not in ("program", "output")}
        result = {"versions": good[0]["versions"], "date": good[0]["date"], "rounds": arguments.rounds,
                  "options": kept, "rows": rows}
        result_file.write(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
