#!/usr/bin/env python3
"""What checkpoints cost: one problem with and without, by `stream-cqsa run`.

A pair of runs, one with --checkpoint, is made in each round: one after the other, or side by side on two
GPUs or two CPU cores, which they exchange from round to round. The cost is what the median of the runs with
checkpoints takes longer. Both give the same output. Writes JSON and prints a line a round.
"""

import argparse
import concurrent.futures
import pathlib
import shutil
import statistics
import sys
import tempfile

from bench_divisions import run
import result_file


def command_of(arguments, folder, checkpoint):
    command = [arguments.program, "run", "--input", "synthetic:1", "--shape", arguments.shape,
               "--dtype", arguments.dtype, "--backend", arguments.backend,
               "--device-memory", arguments.device_memory, "--host-memory", arguments.host_memory,
               "--output", str(folder / "o.npy"), "--report", str(folder / "report.json"),
               "--overwrite", "--quiet", "--no-verify"]
    if checkpoint:
        command += ["--checkpoint", str(folder / "checkpoint"), "--checkpoint-interval", str(arguments.interval)]
    return command + ["--causal"] * arguments.causal + arguments.options.split()


def one_run(arguments, checkpoint, prefix):
    """The report of a run in a folder of its own, which is removed; `prefix` is the command that places it."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        if checkpoint:
            (folder / "checkpoint").mkdir()
        command = [*prefix, *command_of(arguments, folder, checkpoint)]
        report = run(command, folder)
        if isinstance(report, str):
            raise SystemExit(f"bench_checkpoints: {' '.join(command)}: {report}")
        return report
    finally:
        shutil.rmtree(folder)


def prefixes(arguments):
    """Of the places that runs can have at once: the commands that put a run there."""
    if arguments.gpus:
        return [["env", f"CUDA_VISIBLE_DEVICES={gpu}"] for gpu in arguments.gpus.split(",")]
    if arguments.cores:
        return [["taskset", "--cpu-list", core] for core in arguments.cores.split(",")]
    return [[]]


def one_round(arguments, number):
    """(report without, report with checkpoints)."""
    there = prefixes(arguments)
    places = [there[number % len(there)], there[(number + 1) % len(there)]]
    with concurrent.futures.ThreadPoolExecutor(len(there)) as threads:
        return [*threads.map(lambda job: one_run(arguments, *job), zip((False, True), places))]


def summarise(pairs):
    outputs = {report["certificate"]["output"]["checksum"] for pair in pairs for report in pair}
    if len(outputs) > 1 or not all(report["certificate"]["ok"] for pair in pairs for report in pair):
        raise SystemExit("bench_checkpoints: the runs gave different outputs, or lacked scores")
    plain = [pair[0]["seconds"] for pair in pairs]
    kept = [pair[1]["seconds"] for pair in pairs]
    written = [pair[1]["checkpoint"] for pair in pairs]
    return {"seconds_without": plain, "seconds_with": kept,
            "cost": statistics.median(kept) / statistics.median(plain) - 1,
            "checkpoints": [one["written"] for one in written], "checkpoint_bytes": [one["bytes"] for one in written],
            "checkpoint_seconds": [one["seconds"] for one in written], "output": outputs.pop()}


def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/src/app/stream-cqsa")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--shape", default="1,65536,4,64", help="B,N,H,D")
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--device-memory", default="256MiB")
    parser.add_argument("--host-memory", default="4GiB")
    parser.add_argument("--interval", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--options", default="", help="more options of stream-cqsa run, in one word")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--gpus", help="two of them, as 0,1: the runs of a round go side by side")
    places.add_argument("--cores", help="two of the CPU's, as 0,1, likewise (with --options '--threads 1')")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", help="for outputs and checkpoints, which are removed")
    parser.add_argument("--output", help="where to write the JSON")
    arguments = parser.parse_args(words)
    given = arguments.gpus or arguments.cores
    if arguments.rounds < 1 or (given and len(set(given.split(","))) != 2):
        parser.error("at least one round is needed, and two different GPUs or cores, if any")
    return arguments


def main(words=None):
    arguments = options(words)
    pairs = []
    for number in range(arguments.rounds):
        pairs.append(one_round(arguments, number))
        plain, kept = pairs[-1]
        print(f"without {plain['seconds']:.2f} s, with {kept['seconds']:.2f} s and "
              f"{kept['checkpoint']['written']} checkpoints", flush=True)
    result = summarise(pairs)
    print(f"cost {100 * result['cost']:.2f}%")
    if arguments.output:
        kept = {key: value for key, value in vars(arguments).items() if key not in ("program", "output", "work")}
        plain = pairs[0][0]
        result = {"versions": plain["versions"], "date": plain["date"], "options": kept, **result}
        result_file.write(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
