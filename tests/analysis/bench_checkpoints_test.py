"""Tests of analysis/bench_checkpoints.py with a made-up program."""

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
import bench_checkpoints as program  # noqa: E402  (needs the path above)

# With checkpoints 103 s, else 100 s; on device 1 the output is another one.
FAKE_PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys
words = sys.argv[1:]
value = lambda option: words[words.index(option) + 1]
kept = "--checkpoint" in words
if kept and not pathlib.Path(value("--checkpoint")).is_dir():
    sys.exit("stream-cqsa: no such directory")
device = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
with pathlib.Path(__file__).with_name("calls").open("a") as file:
    file.write(json.dumps([kept, device, sorted(os.sched_getaffinity(0))]) + "\\n")
report = {{"versions": {{"version": "1"}}, "date": "today", "seconds": 103 if kept else 100,
          "checkpoint": {{"written": 9, "bytes": 7, "seconds": 2}} if kept else None,
          "certificate": {{"ok": True, "output": {{"checksum": value("--shape") if device != "9" else "other"}}}}}}
pathlib.Path(value("--report")).write_text(json.dumps(report))
"""


class BenchCheckpoints(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.program = self.folder / "stream-cqsa"
        self.program.write_text(FAKE_PROGRAM)
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    def run_it(self, *words):
        output = self.folder / "result.json"
        with contextlib.redirect_stdout(io.StringIO()):
            program.main(["--program", str(self.program), "--output", str(output),
                          "--work", str(self.folder), *words])
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return json.loads(output.read_text()), calls

    def test_cost(self):
        result, calls = self.run_it("--rounds", "2")
        self.assertAlmostEqual(result["cost"], 0.03)
        self.assertEqual(result["checkpoints"], [9, 9])
        self.assertEqual([kept for kept, *_ in calls], [False, True, False, True])
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()),
                         ["calls", "result.json", "stream-cqsa"])

    def test_devices_are_exchanged(self):
        _, calls = self.run_it("--rounds", "2", "--gpus", "3,5")
        self.assertEqual(sorted(call[:2] for call in calls[:2]), [[False, "3"], [True, "5"]])
        self.assertEqual(sorted(call[:2] for call in calls[2:]), [[False, "5"], [True, "3"]])

    def test_cores_are_exchanged(self):
        here = sorted(os.sched_getaffinity(0))
        if len(here) < 2:
            self.skipTest("one core")
        _, calls = self.run_it("--rounds", "2", "--cores", f"{here[0]},{here[1]}")
        places = lambda both: sorted((call[0], call[2]) for call in both)  # noqa: E731
        self.assertEqual(places(calls[:2]), [(False, here[:1]), (True, here[1:2])])
        self.assertEqual(places(calls[2:]), [(False, here[1:2]), (True, here[:1])])

    def test_other_output(self):
        with self.assertRaisesRegex(SystemExit, "different outputs"):
            self.run_it("--rounds", "1", "--gpus", "3,9")


if __name__ == "__main__":
    unittest.main()
