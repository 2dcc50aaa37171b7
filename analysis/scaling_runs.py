"""Runs of a scaling study: JSON lines, one a run, as jobs/scaling_study.sh writes them.

    label, ranks, workers, gpus, n, heads, dim, dtype, causal, chunks, seconds, checksum
    stages           name -> {busy_seconds, operations, bytes}, summed over the workers
    master           {busy_seconds_merge, busy_seconds_other, wall_seconds}
    workers_detail   [{rank, host, device, bytes_read, bytes_copied_in, compute_seconds, subproblems}]

Runs of one label make a series; what repeats a run (same label, problem and count) counts by its median.
"""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from problem import ITEM_BYTES, Shape

NEEDED = ("label", "ranks", "workers", "n", "heads", "dim", "dtype", "causal", "chunks", "seconds")


class BadInput(Exception):
    """A file or option cannot be used; the message is one line."""


@dataclass(frozen=True)
class Run:
    """One line of a results file."""
    record: dict

    @property
    def label(self):
        return self.record["label"]

    @property
    def shape(self):
        r = self.record
        return Shape(r["n"], r["heads"], r["dim"], r["dtype"], bool(r["causal"]))

    @property
    def units(self):
        """What the speed-up is counted in: GPUs, or workers where there are none."""
        return self.record.get("gpus") or max(1, self.record["workers"])

    @property
    def seconds(self):
        return self.record["seconds"]

    @property
    def rate(self):
        """flop/s of the whole run."""
        return self.shape.flops() / self.seconds

    def stages(self):
        """Stage -> busy seconds of a worker, on average, as a share of the wall clock."""
        workers = max(1, self.record["workers"])
        return {name: totals["busy_seconds"] / workers / self.seconds
                for name, totals in self.record.get("stages", {}).items() if totals["operations"]}

    def bytes_in(self):
        """Bytes that each worker copied in (or read, where nothing is copied)."""
        return [one.get("bytes_copied_in") or one.get("bytes_read", 0)
                for one in self.record.get("workers_detail") or []]

    def token_bytes(self):
        """Bytes of a token of Q, K and V together."""
        return 3 * self.shape.heads * self.shape.dim * ITEM_BYTES[self.shape.dtype]

    def master_share(self, of):
        """Busy share of the master's wall clock; `of`: merge or other. None where not recorded."""
        master = self.record.get("master") or {}
        wall = master.get("wall_seconds")
        return master.get(f"busy_seconds_{of}", 0) / wall if wall else None


def read_runs(paths):
    """The runs of some files. Throws BadInput where a line is no run."""
    runs = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                runs.append(parse_run(line, f"{path}:{number}"))
    if not runs:
        raise BadInput(f"{', '.join(map(str, paths))}: no runs; jobs/scaling_study.sh writes them")
    return runs


def parse_run(line, where):
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON: {error}") from error
    missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
    if missing:
        raise BadInput(f"{where}: lacks '{missing[0]}'; a run has {', '.join(NEEDED)}")
    seconds = record["seconds"]
    if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0):
        raise BadInput(f"{where}: seconds is {seconds!r}; only finished runs belong here")
    if record["dtype"] not in ITEM_BYTES:
        raise BadInput(f"{where}: dtype '{record['dtype']}' is not one of {', '.join(ITEM_BYTES)}")
    return Run(record)


def series(runs):
    """label -> its runs by ascending count; of repeated ones the median (the lower of two)."""
    repeats = defaultdict(list)
    for run in runs:
        repeats[run.label, run.units, run.shape, run.record["chunks"]].append(run)
    by_label = defaultdict(list)
    for same in repeats.values():
        middle = statistics.median_low([run.seconds for run in same])
        by_label[same[0].label].append(next(run for run in same if run.seconds == middle))
    return {label: sorted(of_label, key=lambda run: run.units) for label, of_label in by_label.items()}


def speed_up(run, base):
    """How much faster than one unit of the base's speed. By rates, so that it holds for weak scaling too."""
    return run.rate / base.rate * base.units


def efficiency(run, base):
    return speed_up(run, base) / run.units


def checksums(runs):
    """(problem, chunks) -> the set of checksums of its runs; a run without one gives None."""
    found = defaultdict(set)
    for run in runs:
        found[run.shape, run.record["chunks"]].add(run.record.get("checksum") or None)
    return found


def output_verdict(run, runs):
    """What the table says of the run's output beside those of all runs of its problem and division."""
    alike = [one for one in runs if (one.shape, one.record["chunks"]) == (run.shape, run.record["chunks"])]
    values = checksums(alike)[run.shape, run.record["chunks"]]
    if None in values:
        return "no checksum"
    if len(values) > 1:
        return "DIFFERS"
    return f"same bits ({len(alike)} runs)" if len(alike) > 1 else "one run"
