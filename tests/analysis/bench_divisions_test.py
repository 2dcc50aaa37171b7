"""Tests of analysis/bench_divisions.py with a made-up program."""

import contextlib
import io
import json
import pathlib
import stat
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import bench_divisions as program  # noqa: E402  (needs the path above)

# Notes each call, and answers with a report whose times grow from call to call; c = 133 never fits.
FAKE_PROGRAM = f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
calls = pathlib.Path(__file__).with_name("calls")
with calls.open("a") as file:
    file.write(json.dumps(words) + "\\n")
number = len(calls.read_text().splitlines())
value = lambda option: words[words.index(option) + 1]
tiles = value("--division") == "tiles"
chunks = int(value("--chunks")) if "--chunks" in words else 13
if chunks == 133:
    print("a warning", file=sys.stderr)
    sys.exit("stream-cqsa: device memory 1 MiB is too small")
stage = lambda seconds, count: {{"busy_seconds": seconds, "bytes": count, "operations": 1}}
plan = {{"division": "tiles" if tiles else "cqs", "tile": 128, "head_groups": [[0, 2]], "subproblem_count": 35,
        "accumulators": {{"placement": "device"}}, **({{"grid": [5, 7]}} if tiles else {{"c": chunks}})}}
workers = [{{"host_bytes": 900, "peak_resident": 70, "device_bytes": 1}}] if number % 2 else None
report = {{"versions": {{"version": "1"}}, "date": "today", "seconds": number, "flop_per_second": 1e9 / number,
          "scores_computed": 7, "stages": {{"compute": stage(3, 0), "copy in": stage(1, 3 << 20),
          "copy out": stage(2, 5 << 30), "merge": stage(0.5, 0), "read": stage(0, 11)}},
          "memory": {{"device": {{"allocated": 1000}}, "host": {{"allocated": 500}}, "peak_resident": 60}},
          "workers": workers, "mergers": None, "plan": plan,
          "certificate": {{"ok": chunks != 6, "output": {{"checksum": str(number) if chunks == 5 else "1"}}}}}}
pathlib.Path(value("--report")).write_text(json.dumps(report))
"""


class BenchDivisions(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.program = self.folder / "stream-cqsa"
        self.program.write_text(FAKE_PROGRAM)
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    def run_it(self, *words):
        """(status, table, result or None, the calls)."""
        output, table = self.folder / "result.json", io.StringIO()
        with contextlib.redirect_stdout(table):
            status = program.main(["--program", str(self.program), "--output", str(output), *words])
        result = json.loads(output.read_text()) if output.exists() else None
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return status, table.getvalue(), result, calls

    def test_entries_take_turns_and_times_are_medians(self):
        status, table, result, calls = self.run_it("--chunks", "7", "--budgets", "1MiB", "--rounds", "3", "--causal")
        self.assertEqual(status, 0)
        self.assertEqual(len(calls), 12)  # a warm-up and three rounds of three entries
        for number, call in enumerate(calls):
            self.assertIn("--causal", call)
            self.assertEqual(call[call.index("--division") + 1], "tiles" if number % 3 == 2 else "cqs")
            self.assertEqual("--chunks" in call, number % 3 == 0)
        rows = {row["entry"]: row for row in result["rows"]}
        self.assertEqual(rows["cqs, c=7"]["all_seconds"], [4, 7, 10])
        self.assertEqual(rows["cqs"]["seconds"], 8)
        self.assertEqual(rows["tiles"]["all_seconds"], [6, 9, 12])
        self.assertEqual(rows["tiles"]["grid"], [5, 7])
        self.assertEqual(rows["tiles"]["bytes_in"], 3 << 20)
        self.assertEqual(rows["tiles"]["bytes_out"], 5 << 30)
        self.assertEqual(rows["tiles"]["device_bytes"], 1000)
        self.assertEqual(rows["cqs"]["c"], 13)
        self.assertEqual((result["versions"], result["date"], result["rounds"]), ({"version": "1"}, "today", 3))
        self.assertNotIn(str(self.folder), json.dumps(result))
        self.assertEqual(len(table.splitlines()), 4)
        self.assertIn("5x7", table)
        self.assertIn("5.00 GiB", table)

    def test_what_does_not_fit_is_said_once_and_left_out(self):
        status, table, result, calls = self.run_it("--chunks", "133", "--budgets", "1MiB", "2MiB", "--rounds", "2")
        self.assertEqual(status, 0)
        self.assertEqual(len(calls), 2 * (1 + 2 * 3))
        errors = [row for row in result["rows"] if "error" in row]
        self.assertEqual([row["budget"] for row in errors], ["1MiB", "2MiB"])
        self.assertIn("too small", errors[0]["error"])
        self.assertIn("too small", table)

    def test_outputs_that_differ_are_no_result(self):
        _, _, result, _ = self.run_it("--chunks", "5", "6", "--budgets", "1MiB", "--rounds", "2")
        self.assertEqual(["error" in row for row in result["rows"]], [True, True, False, False])

    def test_memory_is_that_of_the_rank_that_has_most(self):
        _, _, result, _ = self.run_it("--chunks", "--budgets", "1MiB", "--rounds", "1", "--warm-up", "0")
        self.assertEqual([row["host_bytes"] for row in result["rows"]], [900, 500])
        self.assertEqual([row["peak_resident"] for row in result["rows"]], [70, 60])

    def test_several_ranks_run_under_mpirun(self):
        arguments = program.options(["--ranks", "3", "--mpirun-options", "--bind-to none", "--kv-heads", "2"])
        command = program.command_of(arguments, "1GiB", 3, [], self.folder)
        self.assertEqual(command[:5], ["mpirun", "-n", "3", "--bind-to", "none"])
        self.assertEqual(command[command.index("--kv-heads") + 1], "2")
        self.assertNotEqual(program.command_of(arguments, "1GiB", 1, [], self.folder)[0], "mpirun")

    def test_wrong_usage(self):
        for words in (["--rounds", "0"], ["--ranks", "0"], ["--warm-up", "-1"], ["--budgets", "much"]):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                program.options(words)


if __name__ == "__main__":
    unittest.main()
