"""`bench` measures what it is asked for, or says in one line why it cannot."""

import json
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
