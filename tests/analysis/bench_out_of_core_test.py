"""Tests of analysis/bench_out_of_core.py with a made-up program."""

import contextlib
import io
import json
import os
import pathlib
import stat
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import bench_out_of_core as program  # noqa: E402  (needs the path above)

# Notes each call, writes what it is asked for, and takes a second longer with every run.
FAKE_PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys
words = sys.argv[1:]
calls = pathlib.Path(__file__).with_name("calls")
with calls.open("a") as file:
    file.write(json.dumps(words) + "\\n")
runs = sum(json.loads(line)[0] == "run" for line in calls.read_text().splitlines())
value = lambda option: words[words.index(option) + 1]
plan = {{"c": 31, "head_groups": [[0, 3], [3, 2]], "accumulators": {{"placement": "memory"}},
        "request": {{"device": {{"name": "a device"}}}}}}
if words[0] == "bench":
    folder = pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "stream-cqsa"
    folder.mkdir()
    (folder / "costs-a.json").write_text('{{"read_direct_bytes_per_second": 5}}')
elif words[0] == "generate":
    pathlib.Path(value("--output")).write_bytes(bytes(1000))
elif words[0] == "plan":
    print(json.dumps(plan))
else:
    if value("--direct-io") == "yes":
        print("stream-cqsa: " + value("--input") + " cannot be read directly", file=sys.stderr)
    if os.environ.get("FAKE_FAILS"):
        sys.exit("stream-cqsa: no such luck")
    stage = lambda seconds, count: {{"busy_seconds": seconds, "bytes": count, "operations": 1}}
    checksum = value("--host-memory") if os.environ.get("FAKE_DIFFERS") else "1"
    pathlib.Path(value("--report")).write_text(json.dumps({{
        "versions": {{"commit": "c0ffee"}}, "date": "today", "command": words, "seconds": runs,
        "flop_per_second": 1e12 / runs, "predicted": {{"seconds": 2, "disk": None}},
        "stages": {{"compute": stage(1, 0), "read": stage(0.5, 3000), "copy in": stage(0, 4000), "spill": stage(0, 0)}},
        "memory": {{"device": {{"allocated": 100}}, "host": {{"allocated": 250}}, "scratch": {{"used": 0}},
                   "peak_resident": 300}},
        "plan": plan, "certificate": {{"ok": True, "output": {{"checksum": checksum}}}}}}))
"""


class BenchOutOfCore(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.program = self.folder / "stream-cqsa"
        self.program.write_text(FAKE_PROGRAM)
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)
        for name in ("disk", "memory"):
            (self.folder / name).mkdir()

    def run_it(self, *words, **environment):
        """(status, what was printed, result or None, the calls)."""
        output, printed = self.folder / "result.json", io.StringIO()
        os.environ.update(environment)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                status = program.main(["--program", str(self.program), "--output", str(output), "--folder",
                                       str(self.folder / "disk"), "--memory-folder", str(self.folder / "memory"),
                                       *words])
        finally:
            for name in environment:
                del os.environ[name]
        result = json.loads(output.read_text()) if output.exists() else None
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return status, printed.getvalue(), result, calls

    def test_disk_and_memory_take_turns_on_one_division(self):
        status, printed, result, calls = self.run_it("--rounds", "3", "--causal", "--host-memory", "1GiB")
        self.assertEqual(status, 0, printed)
        self.assertEqual([call[0] for call in calls[:3]], ["bench", "generate", "plan"])
        runs = calls[3:]
        self.assertEqual(len(runs), 8)  # a warm-up and three rounds of both
        for number, call in enumerate(runs):
            value = {word: after for word, after in zip(call, call[1:])}
            self.assertIn("--causal", call)
            self.assertEqual((value["--chunks"], value["--heads-per-group"]), ("31", "3"))
            self.assertEqual(value["--direct-io"], "no" if number % 2 else "yes")
            self.assertEqual(value["--host-memory"], "32GiB" if number % 2 else "1GiB")
            place = self.folder / ("memory" if number % 2 else "disk")
            self.assertTrue(value["--input"].startswith(str(place)))
        disk, memory = result["rows"]
        self.assertEqual((disk["entry"], disk["seconds"], disk["all_seconds"]), ("disk", 5, [3, 5, 7]))
        self.assertEqual((memory["entry"], memory["seconds"]), ("memory", 6))
        self.assertEqual(result["disk_over_memory"], 5 / 6)
        self.assertEqual((result["input_bytes"], result["host_memory_over_inputs"]), (1000, 0.25))
        self.assertEqual((result["device"], result["versions"]["commit"]), ("a device", "c0ffee"))
        self.assertEqual(result["costs"], {"read_direct_bytes_per_second": 5})
        self.assertEqual(disk["said"], ["stream-cqsa: DISK/qkv.safetensors cannot be read directly"])
        self.assertEqual(memory["said"], [])
        self.assertNotIn(str(self.folder), json.dumps(result))
        self.assertEqual(list((self.folder / "disk").iterdir()) + list((self.folder / "memory").iterdir()), [])

    def test_outputs_that_differ_are_a_failure(self):
        status, printed, _, _ = self.run_it("--rounds", "1", "--warm-up", "0", FAKE_DIFFERS="1")
        self.assertEqual(status, 1)
        self.assertIn("different outputs", printed)

    def test_a_run_that_fails_is_said(self):
        status, printed, result, _ = self.run_it("--no-costs", FAKE_FAILS="1")
        self.assertEqual(status, 1)
        self.assertIn("no such luck", printed)
        self.assertIsNone(result)

    def test_wrong_usage(self):
        for words in (["--folder", ".", "--rounds", "0"], ["--folder", ".", "--warm-up", "-1"], []):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                program.parse(words)


if __name__ == "__main__":
    unittest.main()
