"""Ranks that are lost in mid-run, where MPI lets the others go on."""

import json
import os
import signal
import time
import unittest

import numpy as np

from cli import run_program
from ranks_test import Ranks

KILLS = int(os.environ.get("STREAM_CQSA_LOST_RANKS", "4"))


class Lost(Ranks):

    shape = (1, 32000, 2, 64)
    options = ["--chunks", "31", "--causal", "--threads", "1", "--heads-per-group", "1"]
    launch_options = ["--with-ft", "ulfm"]

    @classmethod
    def setUpClass(cls):
        if "--with-ft ulfm" not in run_program("--version").stdout:
            raise unittest.SkipTest("this MPI has no user-level fault mitigation")

    def setUp(self):
        super().setUp()
        self.save_inputs(shape=self.shape, dtype=np.float16)
        self.expected = self.alone()

    def plain(self, *extra):
        return self.command("--overwrite", *extra)

    def durable(self, *extra):
        return self.plain("--checkpoint", self.path("ckpt"), "--checkpoint-interval", "0.05", *extra)

    def begin(self, ranks, command):
        """A run of which the work has begun: its first rows, or its first merged partials, are kept."""
        for name in ("o.npy", "lse-o.npy"):
            self.path(name).unlink(missing_ok=True)
        journal, output = self.path("ckpt") / "journal", self.path("o.npy.partial")
        process = self.start(ranks, command)

        def has_begun():
            if "--checkpoint" in command:
                return journal.exists() and journal.stat().st_size > 32
            return output.exists() and output.stat().st_blocks > 8

        while process.poll() is None and not has_begun():
            time.sleep(0.005)
        self.assertIsNone(process.poll(), "the run ended before it could be disturbed")
        return process

    def kill(self, process, ranks):
        found = self.rank_processes(process)
        for rank in ranks:
            try:
                os.kill(found[rank], signal.SIGKILL)
            except (KeyError, ProcessLookupError):
                pass

    def ends_well(self, process, report):
        _, error = process.communicate(timeout=250)
        self.assertEqual(process.returncode, 0, error)
        self.assertEqual(self.bytes_of("o.npy"), self.expected)
        self.assertFalse(list(self.folder.glob("*.partial")))
        report = json.loads(report.read_text())
        self.assertTrue(report["certificate"]["ok"])
        lost = [worker["rank"] for worker in report["workers"] if worker["failure"] == "lost"]
        for rank in lost:
            self.assertIn(f"rank {rank} was lost", error)
        return lost

    def test_lost_workers_are_done_without(self):
        report = self.path("r.json")
        lost = 0
        for number in range(KILLS):
            ranks = (3, 5)[number % 2]
            command = (self.plain, self.durable)[number // 2 % 2]
            victims = self.random_moment.sample(range(1, ranks), ranks // 2)
            with self.subTest(number=number, ranks=ranks, victims=victims):
                process = self.begin(ranks, command("--report", report))
                time.sleep(self.random_moment.uniform(0, 1))
                self.kill(process, victims)
                known = self.ends_well(process, report)
                self.assertLessEqual(set(known), set(victims))
                lost += len(known)
        self.assertGreater(lost, 0, "no worker was lost at work")

    def test_lost_workers_are_done_without_where_several_ranks_merge(self):
        report = self.path("r.json")
        lost = 0
        for number in range(KILLS):
            command = (self.plain, self.durable)[number % 2]
            victims = self.random_moment.sample(range(3, 6), 1 + number % 2)
            with self.subTest(number=number, victims=victims):
                process = self.begin(6, command("--mergers", "2", "--report", report))
                time.sleep(self.random_moment.uniform(0, 0.5))
                self.kill(process, victims)
                known = self.ends_well(process, report)
                self.assertLessEqual(set(known), set(victims))
                lost += len(known)
        self.assertGreater(lost, 0, "no worker was lost at work")

    def test_a_lost_merger_ends_a_run_that_can_be_continued(self):
        for victim in (1, 2):
            process = self.begin(5, self.durable("--mergers", "2"))
            self.kill(process, [victim])
            _, error = process.communicate(timeout=100)
            self.assertEqual(process.returncode, 75, error)
            self.assertIn(f"rank {victim}, which merges, was lost", error)
            self.assertIn("the same command continues", error)
            self.mpirun(5, self.durable("--mergers", "2"))
            self.assertEqual(self.bytes_of("o.npy"), self.expected)

    def test_one_that_is_lost_at_the_beginning_is_told_of(self):
        report = self.path("r.json")
        process = self.begin(3, self.durable("--report", report))
        self.kill(process, [2])
        self.assertEqual(self.ends_well(process, report), [2])

    def test_without_workers_or_master_the_run_can_be_continued(self):
        for victims, reason in (([1, 2], "no worker is left"), ([0], "the master, was lost")):
            process = self.begin(3, self.durable())
            self.kill(process, victims)
            _, error = process.communicate(timeout=100)
            self.assertEqual(process.returncode, 75, error)
            lines = [line for line in error.splitlines() if "the same command continues" in line]
            self.assertEqual(len(lines), 1, error)
            self.assertIn(reason, lines[0])
            self.mpirun(3, self.durable())
            self.assertEqual(self.bytes_of("o.npy"), self.expected)


if __name__ == "__main__":
    unittest.main()
