#!/usr/bin/env python3
"""Checks the lines of a scaling study: check_study.py RESULTS NUMBER_OF_RUNS"""

import collections
import json
import pathlib
import sys

KEYS = {"label", "ranks", "workers", "gpus", "n", "heads", "dim", "dtype", "causal", "chunks", "seconds", "stages",
        "master", "workers_detail", "checksum"}
PROBLEM = ("n", "heads", "dim", "dtype", "causal", "chunks")

lines = [json.loads(line) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
assert len(lines) == int(sys.argv[2]), f"{len(lines)} lines"
checksums = collections.defaultdict(set)
for line in lines:
    assert KEYS <= line.keys(), f"missing: {KEYS - line.keys()}"
    assert line["seconds"] > 0
    assert line["ranks"] == (1 if line["workers"] == 1 else line["workers"] + 1)
    checksums[tuple(line[key] for key in PROBLEM)].add(line["checksum"])
differing = {problem for problem, values in checksums.items() if len(values) != 1}
assert not differing, f"several outputs of one problem: {differing}"
killed = [line for line in lines if "statuses" in line]
assert len(killed) == 1 and killed[0]["statuses"][0] != 0 and killed[0]["statuses"][-1] == 0, killed
assert killed[0]["resumed_from"] > 0, killed
