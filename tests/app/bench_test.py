"""`bench` measures what it is asked for, or says in one line why it cannot."""

import json
import os
import resource
import subprocess
import time
import unittest

from cli import PROGRAM, CliTest


class Backends(CliTest):

    def test_what_is_of_the_cpu_is_not_measured_for_a_gpu(self):
        for only in (["kernel"], ["copy"], ["merge"], ["stream", "merge"], []):
            options = [word for what in only for word in ("--only", what)]
            line = self.refuse("bench", "--backend", "cuda", *options, names=["--backend cuda", "--only stream"])
            self.assertIn(only[-1] if only else "kernel", line)
        self.refuse("bench", "--backend", "gpu", "--only", "copy", names=["--backend gpu"])
        self.assertIn("GB/s", self.succeed("bench", "--backend", "cpu", "--only", "copy", "--threads", "1").stdout)

    def test_what_cannot_be_measured(self):
        self.refuse("bench", "--only", "speed", names=["--only speed", "stream"])
        self.refuse("bench", "--only", "io", names=["--scratch"])
        self.refuse("bench", "--only", "stream", names=["--shape"])


class Stream(CliTest):

    shape = ["bench", "--only", "stream", "--shape", "1,300,2,16", "--backend", "cpu", "--chunks", "7"]

    def check(self, result, rounds):
        self.assertEqual([one["warm_up"] for one in result["rounds"]], [True] + [False] * rounds)
        self.assertEqual((result["verification"]["ok"], result["verification"]["compared"]), (True, 8))

    def test_the_last_round_is_checked_however_many_there_are(self):
        for rounds in (0, 2):
            for dtype in ("f16", "f32"):
                done = self.succeed(*self.shape, "--dtype", dtype, "--rounds", rounds, "--json")
                self.check(json.loads(done.stdout)["stream"], rounds)

    def test_a_round_with_each_line(self):
        done = self.succeed(*self.shape, "--lockstep", "--json", "--rounds", "1000", input="\n\n\n")
        self.check(json.loads(done.stdout)["stream"], 2)
        answers = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        self.assertEqual(len(answers), 3)
        for answer in answers:
            self.assertGreater(answer["seconds"], 0)

    def test_no_round_is_an_error_of_usage(self):
        self.refuse(*self.shape, "--rounds", "-1", names=["--rounds"])
        self.refuse(*self.shape, "--lockstep", input="", names=["--lockstep", "standard input"])


class Costs(CliTest):
    """`bench --save` and what is predicted by it."""

    def environment(self, folder):
        return {**os.environ, "XDG_CACHE_HOME": str(folder)}

    def predicted(self, folder, *options):
        done = self.succeed("plan", "--backend", "cpu", "--input", "synthetic:1", "--shape", "1,20000,2,64", "--causal",
                            "--threads", "2", *options, env=self.environment(folder))
        line = [line for line in done.stdout.splitlines() if line.startswith("predicted")]
        self.assertEqual(len(line), 1)
        return line[0], done.stderr

    def test_costs_are_kept_and_found_again(self):
        folder = self.folder / "cache"
        self.assertIn("built-in", self.predicted(folder)[0])
        done = self.succeed("bench", "--save", "--backend", "cpu", "--threads", "2", "--seconds", "0.05",
                            "--scratch", self.folder, env=self.environment(folder))
        kept = list(folder.glob("stream-cqsa/costs-*.json"))
        self.assertEqual(len(kept), 1)
        self.assertIn(str(kept[0]), done.stdout)
        costs = json.loads(kept[0].read_text())
        for name, value in costs.items():
            if name.endswith("_per_second"):
                self.assertGreater(value, 0, name)
        self.assertEqual(len(costs["kernels"]), 4)
        self.assertEqual(list(self.folder.glob("stream-cqsa-bench*")), [])
        line, errors = self.predicted(folder)
        self.assertNotIn("built-in", line)
        self.assertEqual(errors, "")

        # Ten times slower kernels make ten times longer plans.
        for kernel in costs["kernels"]:
            for rate in ("flop_per_second", "burst_flop_per_second"):
                kernel[rate] = 1e9
        kept[0].write_text(json.dumps(costs))
        slow = self.predicted(folder)[0]
        self.assertRegex(slow, r"predicted +1m4\ds, bound by compute")  # 4 * 64 * 2 * 2e8 flop at 1e9: 102 s

        kept[0].write_text("{}")
        line, errors = self.predicted(folder)
        self.assertIn("built-in", line)
        self.assertIn(str(kept[0]), errors)

    def test_a_report_has_what_was_predicted(self):
        report = self.folder / "r.json"
        done = self.succeed("run", "--backend", "cpu", "--input", "synthetic:1", "--shape", "1,3000,2,16", "--output",
                            self.folder / "o.npy", "--report", report, env=self.environment(self.folder))
        predicted = json.loads(report.read_text())["predicted"]
        self.assertGreater(predicted["seconds"], 0)
        self.assertIn(predicted["bottleneck"], predicted["busy_seconds"])
        self.assertEqual(predicted["rates"], "built-in")
        self.assertIn("predicted", done.stdout)

    def test_what_cannot_be_saved(self):
        self.refuse("bench", "--save", "--only", "copy", names=["--only"])
        for seconds in ("0", "-1", "61", "nan"):
            self.refuse("bench", "--save", "--seconds", seconds, names=["--seconds"])


class Files(CliTest):

    def test_a_disk_that_fills(self):
        """The size limit of files stands for a disk."""
        command = [PROGRAM, "bench", "--only", "io", "--scratch", str(self.folder), "--threads", "2"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            partial = self.path("stream-cqsa-bench.npy.partial")
            while process.poll() is None and not (partial.exists() and partial.stat().st_size > 0):
                time.sleep(0.001)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
            error = process.communicate()[1]
        self.assertEqual(process.returncode, 1, error)
        # Open MPI may say something of its own before.
        line = error.strip().splitlines()[-1]
        self.assertTrue(line.startswith("stream-cqsa: "), line)
        self.assertIn("stream-cqsa-bench.npy", line)
        self.assertIn("File too large", line)
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
