#!/usr/bin/env python3
"""Predicts runs on R workers: cyclic quorum sets (cqs) beside 2-D tiles and ring attention.

A discrete-event model (simulation.py says what it has of the program) with measured costs: --costs FILE.json
gives any of them, --bench FILE.json takes them from `stream-cqsa bench --json`, and --print-costs shows those
in use, which is also where the defaults are documented. Prints a Markdown table; --output FILE.png draws time,
bytes per worker and the master's load over R.

    simulate.py --length 16777216 --heads 1 --causal --workers 1,8,64,512,4096,10000 --output scaling.png
    simulate.py --check results.jsonl --calibrate     how far the predictions are from measured runs

Exit status: 0 done, 1 a prediction of --check is off by more than --tolerance, 2 wrong usage.
"""

import argparse
import json
import math
import pathlib
import shlex
import statistics
import sys
from dataclasses import asdict, replace

from plot_scaling import count_axis, new_axes, percent, pyplot_or_none
from problem import Shape
from scaling_runs import BadInput, read_runs, series
from simulated_divisions import (MOST_CHUNKS, group_tasks, perfect_count, planned_tasks, quorum_tasks,
                                 shares_by_groups, tile_tasks)
from simulation import Costs, Simulation, simulate_ring

COLUMNS = ("workers", "division", "subproblems", "seconds", "of ideal", "bytes in, each", "most", "partials",
           "master: merge", "dispatch", "link")
COLOURS = {"cqs": "#1f6fb4", "tiles": "#e0913a", "ring": "#8fbc5a"}


# --- costs ---


def read_json(path):
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path}: not a JSON object")
    return document


def costs_of_bench(bench, shape):
    """Costs that `stream-cqsa bench --json` measured, by their names in Costs."""
    values = {}
    mask = "causal" if shape.causal else "full"
    for rate in bench.get("kernel", {}).get("rates", []):
        if (rate["head_dim"], rate["mask"]) == (shape.dim, mask):
            values["kernel_flop_per_second"] = rate["flop_per_second"]
    rounds = bench.get("stream", {}).get("rounds", [])
    if rounds:
        values["kernel_flop_per_second"] = statistics.median(one["kernel_flop_per_second"] for one in rounds)
    elif "copy" in bench:  # the CPU backend's copies; a GPU's are its link's
        copy = bench["copy"]["memcpy_bytes_per_second"]
        values.update(copy_in_bytes_per_second=copy, copy_out_bytes_per_second=copy)
    for rate in bench.get("merge", {}).get("rates", []):
        if rate["head_dim"] == shape.dim:
            threads, merged = bench["merge"]["threads"], rate["partial_bytes_per_second"]
            values.update(merge_threads=threads, merge_bytes_per_second=merged / threads,
                          merge_bytes_per_second_all=merged)
    if "io" in bench:
        values.update(write_bytes_per_second=bench["io"]["write_bytes_per_second"],
                      read_bytes_per_second=bench["io"]["cached_read_bytes_per_second"])
    return values


def calibrated(costs, run, shared):
    """The costs with those that a run on the fewest workers shows of itself."""
    stages = run.record.get("stages", {})
    values = {}
    write = stages.get("write", {})
    if write.get("bytes") and write["busy_seconds"] > 0:
        values["write_bytes_per_second"] = write["bytes"] / write["busy_seconds"]
    if stages.get("compute", {}).get("busy_seconds"):
        rate = run.shape.flops() / stages["compute"]["busy_seconds"]
        values.update(kernel_flop_per_second=rate, launch_seconds=0.0)
        if shared:
            values["shared_flop_per_second"] = rate * max(1, run.record["workers"])
    return replace(costs, **values)


# --- predictions ---


def predict(division, shape, workers, costs, options):
    """The number of subproblems and the Outcome of a division."""
    if division == "ring":
        return workers, simulate_ring(shape, workers, costs)
    groups = options.groups or shape.heads
    chunks = options.chunks or perfect_count(math.ceil(options.tasks_per_worker * workers / groups))
    if division == "tiles":
        tasks = tile_tasks(shape, workers, options.tasks_per_worker)
    elif options.program:
        own = ["--chunks", str(options.chunks)] if options.chunks else []
        tasks = planned_tasks(shape, shlex.split(options.program), own + shlex.split(options.plan_options))
    elif shares_by_groups(groups, workers):
        tasks = group_tasks(shape, chunks, groups, workers)
    else:
        tasks = quorum_tasks(shape, chunks, groups)
    return len(tasks), Simulation(shape, tasks, workers, costs).run()


def row_of(workers, division, subproblems, outcome, ideal):
    share = lambda seconds: percent(seconds / (outcome.seconds or math.inf))
    return (str(workers), division, str(subproblems), f"{outcome.seconds:.4g}", share(ideal),
            f"{statistics.mean(outcome.bytes_in) * 1e-9:.4g} GB", f"{max(outcome.bytes_in) * 1e-9:.4g} GB",
            f"{outcome.bytes_out * 1e-9:.4g} GB", share(outcome.merge_seconds), share(outcome.other_seconds),
            share(outcome.link_seconds))


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def sweep(shape, costs, options):
    """The table's rows, and (division, workers) -> Outcome."""
    rows, outcomes = [], {}
    for workers in options.workers:
        ideal = shape.flops() / costs.kernel_rate(workers) / workers if costs.kernel_rate(workers) else 0.0
        for division in options.divisions:
            subproblems, outcome = predict(division, shape, workers, costs, options)
            outcomes[division, workers] = outcome
            rows.append(row_of(workers, division, subproblems, outcome, ideal))
    return rows, outcomes


def picture(pyplot, outcomes, options):
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), dpi=130, layout="constrained")
    panels = (("Time", "seconds", lambda outcome: outcome.seconds),
              ("Taken in by a worker", "bytes", lambda outcome: statistics.mean(outcome.bytes_in)),
              ("The master's busiest part", "of wall clock",
               lambda outcome: max(outcome.merge_seconds, outcome.other_seconds, outcome.link_seconds)
               / (outcome.seconds or math.inf)))
    for cell, (title, unit, value) in zip(axes, panels):
        new_axes(cell, title, "workers", unit)
        for division in options.divisions:
            cell.plot(options.workers, [value(outcomes[division, workers]) for workers in options.workers], "o-",
                      color=COLOURS[division], label=division)
        count_axis(cell, options.workers)
        cell.tick_params(axis="x", labelsize=7)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure


# --- against measured runs ---


def head_groups(run):
    """Of a measured run: as recorded, or from the subproblems that its workers did."""
    done = sum(one.get("subproblems", 0) for one in run.record.get("workers_detail") or [])
    return run.record.get("head_groups") or max(1, round(done / run.record["chunks"]))


def check_rows(runs, costs, options):
    """The table's rows and the largest error of a prediction, runs that gave the costs left out."""
    rows, largest = [], 0.0
    for label, of_label in series(runs).items():
        base = of_label[0]
        tuned = calibrated(costs, base, options.shared_cores) if options.calibrate else costs
        for run in of_label:
            groups, workers = head_groups(run), max(1, run.record["workers"])
            # With a checkpoint accumulators are on the master.
            by_groups = run.record.get("resumed_from") is None and shares_by_groups(groups, workers)
            division = (run.shape, run.record["chunks"], groups)
            tasks = group_tasks(*division, workers) if by_groups else quorum_tasks(*division)
            outcome = Simulation(run.shape, tasks, workers, tuned, run.record["ranks"] == 1).run()
            error = outcome.seconds / run.seconds - 1
            gave = options.calibrate and run is base
            if not gave:
                largest = max(largest, abs(error))
            rows.append((label, str(run.units), f"{run.seconds:.3f}", f"{outcome.seconds:.3f}",
                         f"{100 * error:+.1f}%" + (" (gave the costs)" if gave else "")))
    return rows, largest


def check(costs, options):
    rows, largest = check_rows(read_runs([options.check]), costs, options)
    good = largest <= options.tolerance
    print(markdown(("run", "units", "measured, s", "predicted, s", "error"), rows))
    print(f"\nLargest error {100 * largest:.1f}%, {'within' if good else 'BEYOND'} {100 * options.tolerance:.0f}%.")
    return 0 if good else 1


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = lambda text: sorted({int(one) for one in text.split(",")})
    parser.add_argument("--length", type=int, default=1 << 24)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("f16", "bf16", "f32"), default="f16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--workers", type=counts, default="1,2,4,8,32,128,512,2048,10000", help="(default: %(default)s)")
    parser.add_argument("--divisions", type=lambda text: text.split(","), default="cqs,tiles,ring",
                        help="(default: %(default)s)")
    parser.add_argument("--tasks-per-worker", type=int, default=4,
                        help="at least so many subproblems, or pieces of a tile (default: %(default)s)")
    parser.add_argument("--chunks", type=int, help="of cqs (default: by --tasks-per-worker)")
    parser.add_argument("--groups", type=int, help="head groups of cqs (default: one a head)")
    parser.add_argument("--program", help="stream-cqsa: its own plans for cqs")
    parser.add_argument("--plan-options", default="", help="of `stream-cqsa plan`, such as '--device-memory 4GiB'")
    parser.add_argument("--costs", type=pathlib.Path, help="JSON: cost -> value, over those of --bench")
    parser.add_argument("--bench", type=pathlib.Path, help="JSON of `stream-cqsa bench --json`")
    parser.add_argument("--print-costs", action="store_true", help="print the costs in use and stop")
    parser.add_argument("--output", type=pathlib.Path, help="the picture, .png; needs matplotlib")
    parser.add_argument("--check", type=pathlib.Path, help="JSON lines of measured runs, see scaling_runs.py")
    parser.add_argument("--calibrate", action="store_true", help="--check: rates from the smallest run of each label")
    parser.add_argument("--shared-cores", action="store_true", help="--calibrate: the workers share that run's cores")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of --check (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.length, options.heads, options.dim, options.tasks_per_worker, *options.workers) < 1:
        parser.error("lengths and counts are at least 1")
    if options.groups is not None and (options.groups < 1 or options.heads % options.groups):
        parser.error(f"--groups {options.groups} does not divide the {options.heads} heads")
    if options.chunks is not None and not 1 <= options.chunks <= MOST_CHUNKS:
        parser.error(f"--chunks {options.chunks}; from 1 to {MOST_CHUNKS} are supported")
    unknown = set(options.divisions) - set(COLOURS)
    if unknown:
        parser.error(f"--divisions: '{sorted(unknown)[0]}' is not one of {', '.join(COLOURS)}")
    return options


def run(options):
    shape = Shape(options.length, options.heads, options.dim, options.dtype, options.causal)
    costs = Costs.of({**(costs_of_bench(read_json(options.bench), shape) if options.bench else {}),
                      **(read_json(options.costs) if options.costs else {})})
    if options.print_costs:
        print(json.dumps(asdict(costs), indent=1))
        return 0
    if options.check:
        return check(costs, options)
    pyplot = pyplot_or_none() if options.output else None
    if options.output and pyplot is None:
        raise BadInput("--output: matplotlib is not installed; without --output the table needs none")
    rows, outcomes = sweep(shape, costs, options)
    print(f"{shape}\n\n{markdown(COLUMNS, rows)}")
    if pyplot:
        picture(pyplot, outcomes, options).savefig(options.output)
    return 0


def main(arguments):
    try:
        return run(parse_arguments(arguments))
    except BadInput as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
