#!/usr/bin/env python3
"""What runs were predicted to take, beside what they took, and their memory beside what was planned.

Measures the machine's costs first (`stream-cqsa bench --save`, kept under --work for this study alone), then makes
the runs of a list, each from files under --work to a file there, and reads its report. Writes JSON, prints a table
and, with --picture FILE.png, draws predicted over measured.

    predictions    lengths of 65,536 to 4,194,304, budgets of 256 MiB to 64 GiB, dimensions 64 and 128, both masks
    small          the same problems under 2 to 16 GiB of device memory, and all of it: whether small cards collapse

Exit status: 0 done, 1 a run failed, was not as good as certified, or allocated other than planned.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import result_file

# Length, heads, dimension, type, mask, device memory, more options.
PREDICTIONS = (
    (65536, 8, 64, "f16", "causal", "256MiB"),
    (65536, 8, 128, "bf16", "full", "256MiB"),
    (131072, 8, 128, "bf16", "full", "64GiB"),
    (262144, 8, 64, "bf16", "full", "512MiB"),
    (262144, 8, 128, "bf16", "causal", "256MiB"),
    (524288, 8, 128, "bf16", "causal", "1GiB"),
    (1048576, 8, 64, "f16", "causal", "256MiB"),
    (1048576, 8, 64, "f16", "causal", "1GiB"),
    (1048576, 8, 64, "f16", "causal", "16GiB"),
    (1048576, 8, 64, "f16", "causal", "1GiB", "--chunks", "133"),
    (1048576, 4, 64, "f16", "full", "4GiB"),
    (2097152, 4, 64, "f16", "causal", "2GiB"),
    (2097152, 2, 128, "bf16", "full", "512MiB"),
    (4194304, 2, 64, "f16", "causal", "1GiB"),
    (4194304, 1, 128, "bf16", "causal", "64GiB"),
    (4194304, 1, 64, "bf16", "causal", "256MiB"),
)
SMALL_BUDGETS = ("2GiB", "4GiB", "8GiB", "12GiB", "16GiB", "all")
SMALL = tuple((length, 8, 64, "f16", "causal", budget) for length in (1 << 20, 1 << 22) for budget in SMALL_BUDGETS)
STUDIES = {"predictions": PREDICTIONS, "small": SMALL}


class Study:
    def __init__(self, arguments, folder):
        self.program, self.backend, self.shrink = arguments.program, arguments.backend, arguments.shrink
        self.host_memory = arguments.host_memory
        self.rounds, self.warm_up = arguments.rounds, arguments.warm_up
        self.folder, self.kind = folder, None
        # Costs of this study's own.
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}

    def call(self, *options):
        subprocess.run([self.program, *map(str, options)], check=True, env=self.environment,
                       stdout=subprocess.DEVNULL)

    def measure_costs(self):
        self.call("bench", "--save", "--backend", self.backend, "--scratch", self.folder)
        return json.loads(next(self.folder.glob("stream-cqsa/costs-*.json")).read_text())

    def inputs(self, length, heads, dim, dtype):
        """A file of this shape; of the last run's, where that is the same."""
        path, kind = self.folder / "inputs.safetensors", (length, heads, dim, dtype)
        if self.kind != kind:
            path.unlink(missing_ok=True)
            self.call("generate", "--shape", f"1,{length},{heads},{dim}", "--dtype", dtype, "--output", path)
            self.kind = kind
        return path

    def run(self, length, heads, dim, dtype, mask, budget, *more):
        length //= self.shrink
        path, report = self.inputs(length, heads, dim, dtype), self.folder / "report.json"
        options = [] if budget == "all" else ["--device-memory", budget]
        options += ["--causal"] if mask == "causal" else []
        self.call("run", "--input", path, "--backend", self.backend, "--host-memory", self.host_memory, *options,
                  *more, "--output", self.folder / "o.safetensors", "--overwrite", "--quiet", "--report", report)
        return json.loads(report.read_text())

    def row(self, length, heads, dim, dtype, mask, budget, *more):
        """The median of the rounds after the warm-up, in which files' pages are made."""
        reports = [self.run(length, heads, dim, dtype, mask, budget, *more)
                   for _ in range(self.warm_up + self.rounds)][self.warm_up:]
        first, plan = reports[0], reports[0]["plan"]
        seconds = [report["seconds"] for report in reports]
        measured = statistics.median(seconds)
        device, host = first["memory"]["device"], first["memory"]["host"]
        return {"length": length // self.shrink, "heads": heads, "head_dim": dim, "dtype": dtype, "mask": mask,
                "budget": budget, "options": list(more), "c": plan["c"], "head_groups": len(plan["head_groups"]),
                "accumulators": plan["accumulators"]["placement"], "subproblems": plan["subproblem_count"],
                "predicted_seconds": first["predicted"]["seconds"], "predicted": first["predicted"],
                "seconds": measured, "rounds": seconds, "predicted_over_measured":
                    first["predicted"]["seconds"] / measured,
                "compute_seconds": statistics.median(r["stages"]["compute"]["busy_seconds"] for r in reports),
                "stages": first["stages"],
                "flop_per_second": first["flop"] / measured,
                "device_bytes": device["allocated"], "planned_device_bytes": device["planned"],
                "host_bytes": host["allocated"], "planned_host_bytes": host["planned"],
                "peak_resident_bytes": max(r["memory"]["peak_resident"] for r in reports),
                "certified": all(r["certificate"]["ok"] for r in reports)}


def sound(row):
    return (row["certified"] and row["device_bytes"] == row["planned_device_bytes"]
            and row["host_bytes"] == row["planned_host_bytes"])


def label(row):
    return (f"N={row['length']:,} H={row['heads']} D={row['head_dim']} {row['dtype']} {row['mask']}, {row['budget']}"
            + (" " + " ".join(row["options"]) if row["options"] else ""))


def line(row):
    return (f"{label(row):<62} c={row['c']:<4} predicted {row['predicted_seconds']:8.3f} s  measured "
            f"{row['seconds']:8.3f} s  ratio {row['predicted_over_measured']:.3f}  "
            f"{row['flop_per_second'] * 1e-12:7.1f} TFLOP/s  device {row['device_bytes'] / 2**30:.3f} GiB"
            + ("" if sound(row) else "  NOT AS PLANNED OR CERTIFIED"))


def draw(rows, path):
    plot = importlib.import_module("matplotlib.pyplot")
    figure, axes = plot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axhspan(0.9, 1.1, color="#8fbc5a", alpha=0.25, label="within 10%")
    axes.axhline(1, color="#444444", linewidth=0.8)
    for mask, colour in (("full", "#1f6fb4"), ("causal", "#e0913a")):
        chosen = [row for row in rows if row["mask"] == mask]
        axes.plot([row["seconds"] for row in chosen], [row["predicted_over_measured"] for row in chosen], "o",
                  color=colour, label=mask)
    axes.set(xscale="log", xlabel="measured seconds", ylabel="predicted over measured", ylim=(0.5, 1.5))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/src/app/stream-cqsa")
    parser.add_argument("--study", choices=STUDIES, default="predictions")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--host-memory", default="48GiB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--shrink", type=int, default=1, help="divides every length")
    parser.add_argument("--first", type=int, help="only so many runs of the list")
    parser.add_argument("--work", default="/dev/shm", help="for inputs and outputs, which are removed")
    parser.add_argument("--output", help="where to write the JSON, after every run")
    parser.add_argument("--picture", help="where to draw predicted over measured; needs matplotlib")
    arguments = parser.parse_args()

    folder = pathlib.Path(tempfile.mkdtemp(prefix="predictions.", dir=arguments.work))
    rows = []
    try:
        study = Study(arguments, folder)
        result = {"study": arguments.study, "command": "bench_predictions.py " + " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in vars(arguments).items()
            if value is not None and key not in ("program", "output", "picture", "work")),
            "costs": study.measure_costs()}
        for one in STUDIES[arguments.study][:arguments.first]:
            rows.append(study.row(*one))
            print(line(rows[-1]), flush=True)
            if arguments.output:
                last = json.loads((folder / "report.json").read_text())
                result_file.write(arguments.output,
                                  {**result, "versions": last["versions"], "date": last["date"], "rows": rows})
    except subprocess.CalledProcessError as error:
        print(f"bench_predictions.py: {pathlib.Path(error.cmd[0]).name} {error.cmd[1]} had status {error.returncode}",
              file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0 if all(map(sound, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
