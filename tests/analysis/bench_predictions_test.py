"""bench_predictions.py makes its runs by a program, and says what it was told of them."""

import json
import pathlib
import stat
import subprocess
import sys
import tempfile
import unittest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "analysis" / "bench_predictions.py"

# Stands for stream-cqsa: writes what that would, with the memory or the status that a test asks for.
PROGRAM = r"""#!{python}
import json, os, pathlib, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
if sys.argv[1] == "bench":
    folder = pathlib.Path(os.environ["XDG_CACHE_HOME"], "stream-cqsa")
    folder.mkdir()
    (folder / "costs-A.json").write_text('{{"device": "A"}}')
if sys.argv[1] == "generate":
    pathlib.Path(option("--output")).write_text(option("--shape"))
if sys.argv[1] == "run":
    if {status}: sys.exit({status})
    assert pathlib.Path(option("--input")).exists()
    report = {{"seconds": 2.0, "predicted": {{"seconds": 1.9}}, "flop": 4e12, "stages": {{"compute": {{"busy_seconds": 1.5}}}},
              "plan": {{"c": 7, "head_groups": [1], "accumulators": {{"placement": "device"}}, "subproblem_count": 7}},
              "memory": {{"device": {{"allocated": {allocated}, "planned": 64}}, "host": {{"allocated": 5, "planned": 5}},
                         "peak_resident": 9}},
              "certificate": {{"ok": True}}, "versions": {{"commit": "abc"}}, "date": "today"}}
    pathlib.Path(option("--report")).write_text(json.dumps(report))
"""


class BenchPredictions(unittest.TestCase):

    def run_script(self, *options, status=0, allocated=64):
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, "program")
            program.write_text(PROGRAM.format(python=sys.executable, status=status, allocated=allocated))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            output = pathlib.Path(folder, "out.json")
            done = subprocess.run([sys.executable, str(SCRIPT), "--program", str(program), "--work", folder,
                                   "--output", str(output), *options], capture_output=True, text=True)
            left = sorted(path.name for path in pathlib.Path(folder).iterdir())
            self.assertEqual([name for name in left if name not in ("program", "out.json")], [])
            return done, json.loads(output.read_text()) if output.exists() else None

    def test_a_row_for_each_run(self):
        for study, count in (("predictions", 16), ("small", 12)):
            done, result = self.run_script("--study", study)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(len(result["rows"]), count)
            self.assertEqual(len(done.stdout.splitlines()), count)
            self.assertEqual(result["costs"], {"device": "A"})
            for row in result["rows"]:
                self.assertAlmostEqual(row["predicted_over_measured"], 0.95)
                self.assertAlmostEqual(row["flop_per_second"], 2e12)

    def test_memory_that_was_not_planned(self):
        done, result = self.run_script("--first", "2", allocated=65)
        self.assertEqual(done.returncode, 1)
        self.assertIn("NOT AS PLANNED", done.stdout)
        self.assertEqual(len(result["rows"]), 2)

    def test_a_run_that_fails(self):
        done, result = self.run_script(status=3)
        self.assertEqual(done.returncode, 1)
        self.assertIn("run had status 3", done.stderr)
        self.assertIsNone(result)


if __name__ == "__main__":
    unittest.main()
