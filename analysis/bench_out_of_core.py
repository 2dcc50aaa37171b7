#!/usr/bin/env python3
"""Out of core beside in memory: one problem from files on a disk and from host memory, by `stream-cqsa run`.

The entry `disk` reads files under --folder past the page cache (--direct-io yes) within --host-memory, which should be
well below their size; the entry `memory` reads the same files, copied to --memory-folder, with room for all of them
(--roomy-host-memory). Both write their output to --memory-folder and compute the division of the first, so the bytes
of O must be the same. They run in turn, and times are medians of the rounds after the warm-up. Before that the rates of
the machine and of the disk are measured, under a folder of the study's own, for the prediction. Writes JSON and prints
a table.

Exit status: 0 done, 1 a run failed, was not as good as certified, or the two gave other bytes.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import result_file

INPUTS = "qkv.safetensors"


class Study:
    """The runs of one problem. Files are under `disk` and `memory`, folders that go when it is done."""

    def __init__(self, arguments, disk, memory):
        self.arguments, self.disk, self.memory = arguments, disk, memory
        # Costs of this study's own.
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(disk)}

    def call(self, *words):
        command = [self.arguments.program, *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment)

    def make_inputs(self):
        """Bytes of the file."""
        self.call("generate", "--shape", self.arguments.shape, "--dtype", self.arguments.dtype,
                  "--layout", self.arguments.layout,
                  *(["--kv-heads", self.arguments.kv_heads] if self.arguments.kv_heads else []),
                  "--output", self.disk / INPUTS)
        shutil.copyfile(self.disk / INPUTS, self.memory / INPUTS)
        return (self.disk / INPUTS).stat().st_size

    def measure_costs(self):
        self.call("bench", "--save", "--backend", self.arguments.backend, "--scratch", self.disk)
        return json.loads(next(self.disk.glob("stream-cqsa/costs-*.json")).read_text())

    def options(self, entry):
        of_disk = entry == "disk"
        words = ["--input", (self.disk if of_disk else self.memory) / INPUTS, "--direct-io",
                 "yes" if of_disk else "no", "--host-memory",
                 self.arguments.host_memory if of_disk else self.arguments.roomy_host_memory,
                 "--layout", self.arguments.layout, "--backend", self.arguments.backend]
        words += ["--device-memory", self.arguments.device_memory] if self.arguments.device_memory else []
        words += ["--scratch", self.disk] if of_disk and self.arguments.scratch else []
        return words + ["--causal"] * self.arguments.causal

    def division(self):
        """Options that give both entries the division of the first."""
        plan = json.loads(self.call("plan", *self.options("disk"), *self.chosen(), "--json").stdout)
        heads = max(count for _, count in plan["head_groups"])
        return ["--chunks", plan["c"], "--heads-per-group", heads]

    def chosen(self):
        return ["--chunks", self.arguments.chunks] if self.arguments.chunks else []

    def run(self, entry, division):
        """The report of one run, and what it said on standard error."""
        report = self.disk / "report.json"
        done = self.call("run", *self.options(entry), *division, "--output", self.memory / "o.safetensors",
                         "--overwrite", "--quiet", "--report", report)
        return {**json.loads(report.read_text()), "said": done.stderr.splitlines()}


def measured(report):
    stages, memory = report["stages"], report["memory"]
    read = stages["read"]
    return {"seconds": report["seconds"],
            "flop_per_second": report["flop_per_second"],
            "compute_seconds": stages["compute"]["busy_seconds"],
            "read_seconds": read["busy_seconds"],
            "bytes_read": read["bytes"],
            "bytes_in": stages["copy in"]["bytes"],
            "bytes_spilled": stages["spill"]["bytes"],
            "device_bytes": memory["device"]["allocated"],
            "host_bytes": memory["host"]["allocated"],
            "scratch_bytes": memory["scratch"]["used"],
            "peak_resident": memory["peak_resident"]}


def without(words, folders):
    """A command line without the names of temporary folders."""
    words = [str(word) for word in words]
    for name, folder in folders.items():
        words = [word.replace(str(folder), name) for word in words]
    return words


def summarise(entry, reports, folders):
    rounds = [measured(report) for report in reports]
    first = reports[0]
    return {"entry": entry, **{key: statistics.median(one[key] for one in rounds) for key in rounds[0]},
            "all_seconds": [one["seconds"] for one in rounds],
            "command": without(first["command"], folders),
            "said": sorted({line for report in reports for line in without(report["said"], folders)}),
            "predicted": first["predicted"],
            "accumulators": first["plan"]["accumulators"]["placement"],
            "checksums": sorted({report["certificate"]["output"]["checksum"] for report in reports}),
            "certified": all(report["certificate"]["ok"] for report in reports)}


def measure(study):
    """Both entries' summaries, and a report."""
    arguments = study.arguments
    division = study.division()
    reports = {"disk": [], "memory": []}
    for number in range(arguments.warm_up + arguments.rounds):
        for entry, done in reports.items():
            report = study.run(entry, division)
            counts = number >= arguments.warm_up
            print(f"{entry:<8} {report['seconds']:.3f} s{'' if counts else ' (warm-up)'}", flush=True)
            if counts:
                done.append(report)
    folders = {"DISK": study.disk, "MEMORY": study.memory}
    return [summarise(entry, done, folders) for entry, done in reports.items()], reports["disk"][0]


def text_of(row):
    return (f"{row['entry']:<8} {row['seconds']:>9.3f} {row['flop_per_second'] * 1e-12:>9.2f} "
            f"{row['compute_seconds']:>9.3f} {row['bytes_read'] * 1e-9:>9.2f} "
            f"{row['bytes_read'] / row['seconds'] * 1e-9:>9.2f} {row['host_bytes'] * 1e-9:>9.2f} "
            f"{row['peak_resident'] * 1e-9:>9.2f}")


HEADER = (f"{'entry':<8} {'seconds':>9} {'TFLOP/s':>9} {'compute s':>9} {'read GB':>9} {'GB/s':>9} {'host GB':>9} "
          f"{'peak GB':>9}")


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/src/app/stream-cqsa")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--shape", default="1,4194304,8,64", help="B,N,H,D")
    parser.add_argument("--kv-heads", type=int, help="default: as many as query heads")
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--layout", default="bshd", help="with bhsd no more heads are read than are computed together")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--folder", required=True, help="on the disk: room for the inputs, and for --scratch")
    parser.add_argument("--memory-folder", default="/dev/shm", help="in memory: room for the inputs and the output")
    parser.add_argument("--device-memory", help="default: the program's")
    parser.add_argument("--host-memory", default="3GiB", help="of the runs from the disk")
    parser.add_argument("--roomy-host-memory", default="32GiB", help="of the runs from memory")
    parser.add_argument("--chunks", type=int, help="default: as planned for the runs from the disk")
    parser.add_argument("--scratch", action="store_true", help="accumulators of the runs from the disk may go there")
    parser.add_argument("--no-costs", action="store_true", help="do not measure the machine's rates first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--output", help="where to write the JSON")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1 or arguments.warm_up < 0:
        parser.error("at least one round and no fewer than 0 warm-ups are needed")
    return arguments


def result_of(arguments, bytes_of_inputs, costs, rows, report):
    disk, memory = rows
    kept = {key: value for key, value in vars(arguments).items()
            if key not in ("program", "output", "folder", "memory_folder")}
    plan = report["plan"]
    return {"versions": report["versions"], "date": report["date"], "device": plan["request"]["device"]["name"],
            "options": kept,
            "input_bytes": bytes_of_inputs, "host_memory_over_inputs": disk["host_bytes"] / bytes_of_inputs,
            "c": plan["c"], "head_groups": plan["head_groups"], "costs": costs,
            "disk_over_memory": disk["seconds"] / memory["seconds"], "rows": rows}


def study_of(arguments, disk, memory):
    study = Study(arguments, pathlib.Path(disk), pathlib.Path(memory))
    costs = None if arguments.no_costs else study.measure_costs()
    bytes_of_inputs = study.make_inputs()
    rows, report = measure(study)
    return result_of(arguments, bytes_of_inputs, costs, rows, report)


def main(words=None):
    arguments = parse(words)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as disk, \
                tempfile.TemporaryDirectory(dir=arguments.memory_folder) as memory:
            result = study_of(arguments, disk, memory)
    except subprocess.CalledProcessError as error:
        print(f"bench_out_of_core.py: {error.cmd[1]} had status {error.returncode}: {error.stderr.strip()}",
              file=sys.stderr)
        return 1
    print(HEADER, *map(text_of, result["rows"]), sep="\n")
    print(f"disk over memory: {result['disk_over_memory']:.3f}")
    if arguments.output:
        result_file.write(arguments.output, result)
    checksums = {checksum for row in result["rows"] for checksum in row["checksums"]}
    if len(checksums) > 1 or not all(row["certified"] for row in result["rows"]):
        print("bench_out_of_core.py: the runs gave different outputs, or lacked scores", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
