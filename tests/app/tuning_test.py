"""A run whose rest is planned again, as rates turn out to be others than those it was planned by."""

import json
import unittest

import ranks_test
from cli import CliTest

# Kernels are said to be so slow that they hide merges on the device, which are said to be slow as well, and everything
# else fast. Kernels take long enough here to be measured; merges, reads and copies do not.
WRONG = {"flop_per_second": 4e5, "device_merge_bytes_per_second": 1e4,
         **{f"{name}_bytes_per_second": 1e15
            for name in ("copy_in", "copy_out", "merge", "read", "write", "rewrite")}}


class Tuning(CliTest):

    def run_one(self, *options):
        done = self.succeed("run", *self.inputs(), "--backend", "cpu", "--output", self.path("o.npy"), "--overwrite",
                            "--report", self.path("r.json"), *options)
        return done, json.loads(self.path("r.json").read_text()), self.path("o.npy").read_bytes()

    def test_accumulators_move_in_mid_run_with_the_same_bytes(self):
        self.save_inputs(shape=(1, 6000, 8, 64))
        self.save_costs(**WRONG)
        options = ["--threads", "1", "--chunks", "7", "--heads-per-group", "1", "--device-memory", "16MiB",
                   "--host-memory", "64MiB"]
        plan = self.succeed("plan", *self.inputs(), "--backend", "cpu", *options, "--json").stdout
        self.assertEqual(json.loads(plan)["accumulators"]["placement"], "device")
        done, report, output = self.run_one(*options)
        if report["stages"]["compute"]["busy_seconds"] < 0.3:
            self.skipTest("too fast a machine: kernels are measured from 0.2 s on")
        again, = report["planned_again"]
        self.assertEqual(again["accumulators"], "memory")
        self.assertEqual(again["head_groups"], 8)
        self.assertIn(again["head_groups_done"], range(1, 8))
        self.assertAlmostEqual(again["rates"]["compute"]["planned"] / 4e5, 1, places=4)
        self.assertGreater(again["rates"]["compute"]["measured"], 4e5)
        self.assertLess(again["predicted_seconds"], again["predicted_seconds_as_before"])
        left = 8 - again["head_groups_done"]
        said = f"the remaining {left} of 8 head groups are computed one after another, with accumulators in memory"
        line, = [line for line in done.stderr.splitlines() if line.startswith("stream-cqsa: ")]
        self.assertIn(said, line)
        self.assertEqual([line for line in done.stdout.splitlines() if line.startswith("again ")],
                         [line.replace("stream-cqsa:", "again     ")])
        for memory in (report["memory"]["device"], report["memory"]["host"]):
            self.assertEqual(memory["allocated"], memory["planned"])
            self.assertLessEqual(memory["allocated"], memory["budget"])
        self.assertTrue(report["certificate"]["ok"])

        # A plan that is given is kept.
        self.path("plan.json").write_text(plan)
        done, report, kept = self.run_one("--threads", "1", "--plan", self.path("plan.json"))
        self.assertEqual(report["planned_again"], [])
        self.assertNotIn("again ", done.stdout)
        self.assertEqual(kept, output)


class TuningOnRanks(ranks_test.Ranks):

    options = ["--backend", "cpu", "--threads", "1", "--chunks", "7", "--heads-per-group", "1", "--device-memory",
               "16MiB", "--host-memory", "64MiB"]

    def test_accumulators_move_to_the_ranks_that_merge(self):
        self.save_inputs(shape=(1, 6000, 16, 64))
        self.save_costs(**WRONG)
        expected = self.alone()
        for mergers in (0, 1):
            error = self.mpirun(3 + mergers, self.command("--overwrite", "--mergers", mergers, "--report",
                                                          self.path("r.json")))
            self.assertEqual(self.bytes_of("o.npy"), expected)
            report = json.loads(self.path("r.json").read_text())
            self.assertEqual(report["plan"]["accumulators"]["placement"], "device")
            self.assertTrue(report["certificate"]["ok"])
            said = [line for line in error.splitlines() if "head groups are computed" in line]
            self.assertEqual(len(said), len(report["planned_again"]), error)
            for again in report["planned_again"]:
                self.assertEqual(again["accumulators"], "memory")
            if all(worker["compute_seconds"] > 1 for worker in report["workers"]):  # kernels are measured from 0.2 s on
                self.assertTrue(report["planned_again"])


if __name__ == "__main__":
    unittest.main()
