"""Attention divided into tiles: right, the same bytes on any ranks, and whatever is killed."""

import json
import os
import unittest

import numpy as np

import checkpoint_test
import ranks_test
from cli import CliTest, attention

TILES = ["--division", "tiles", "--grid", "9x5", "--causal", "--threads", "1", "--heads-per-group", "1"]


class OneRank(CliTest):

    def check(self, arrays, *options, causal=True):
        done = self.succeed("run", *self.inputs(), "--division", "tiles", "--causal", *options, "--overwrite",
                            "--output", self.path("o.npy"), "--lse", self.path("lse.npy"), "--report",
                            self.path("r.json"), "--quiet")
        output, lse = attention(*arrays, causal=causal)
        np.testing.assert_allclose(np.load(self.path("o.npy")), output, atol=2e-5)
        np.testing.assert_allclose(np.load(self.path("lse.npy")), lse, atol=2e-5)
        return json.loads(self.path("r.json").read_text())["plan"], done

    def test_agrees_with_numpy(self):
        arrays = self.save_inputs(shape=(2, 300, 4, 16), kv_shape=(2, 170, 2, 16))
        for grid in ("1x1", "1x6", "6x1", "4x7", "7x4", "400x3", "3x400"):
            with self.subTest(grid=grid):
                plan, _ = self.check(arrays, "--grid", grid)
                self.assertEqual(plan["division"], "tiles")
                self.assertEqual("{}x{}".format(*plan["grid"]), grid)
                self.assertNotIn("cover", plan)
        for memory in ("3MiB", "64MiB"):
            plan, _ = self.check(arrays, "--device-memory", memory, "--host-memory", "3MiB")
            self.assertIsNone(plan["request"]["grid"])

    def test_a_plan_that_was_written(self):
        arrays = self.save_inputs(shape=(1, 500, 2, 16))
        options = ["--division", "tiles", "--grid", "4x3", "--causal", "--lse", self.path("lse.npy")]
        done = self.succeed("plan", *self.inputs(), *options, "--json", "--subproblems")
        self.path("plan.json").write_text(done.stdout)
        self.succeed("run", *self.inputs(), "--plan", self.path("plan.json"), "--causal", "--output",
                     self.path("o.npy"), "--lse", self.path("lse.npy"), "--quiet")
        np.testing.assert_allclose(np.load(self.path("o.npy")), attention(*arrays, causal=True)[0], atol=2e-5)
        for more in (["--grid", "4x3"], ["--division", "tiles"], ["--division", "cqs"]):
            self.refuse("run", *self.inputs(), "--plan", self.path("plan.json"), "--causal", *more, "--output",
                        self.path("o2.npy"), names=["--grid", "--division"])

    def test_hostile_options(self):
        self.save_inputs()
        for options, names in [(["--division", "tile"], ["cqs or tiles"]),
                               (["--division", "tiles", "--chunks", "7"], ["--chunks", "--grid"]),
                               (["--grid", "3x4"], ["--grid", "--chunks"]),
                               (["--division", "cqs", "--grid", "3x4"], ["--grid", "--chunks"])]:
            self.refuse("plan", *self.inputs(), *options, names=names)
        for grid in ("3", "3x", "x3", "3x0", "0x3", "-1x3", "3x-1", "3x4x5", "3 x4", "20001x1", "1x20001", "axb",
                     "1e3x1", "99999999999999999999x1", "3X4"):
            self.refuse("plan", *self.inputs(), "--division", "tiles", "--grid", grid,
                        names=[f"--grid '{grid}'", "ROWSxCOLUMNS"])
        for option in ("--device-memory", "--host-memory"):
            self.refuse("plan", *self.inputs(), "--division", "tiles", option, "100B", names=["smallest"])


class AnyRanks(ranks_test.Ranks):

    options = TILES

    def test_bytes_do_not_depend_on_ranks_and_mergers(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        for ranks, mergers in ((2, 0), (3, 0), (5, 0), (3, 1), (5, 2)):
            with self.subTest(ranks=ranks, mergers=mergers):
                report = self.path("r.json")
                self.mpirun(ranks, self.command("--overwrite", "--mergers", mergers, "--report", report))
                self.assertEqual(self.bytes_of("o.npy"), expected)
                self.assertTrue(json.loads(report.read_text())["certificate"]["ok"])

    def test_whole_head_groups_on_the_workers_devices(self):
        self.save_inputs(shape=(1, 3000, 4, 32), dtype=np.float16)
        self.save_costs(merge_bytes_per_second=1e6)
        expected = self.alone()
        report = self.path("r.json")
        self.mpirun(3, self.command("--overwrite", "--report", report))
        self.assertEqual(json.loads(report.read_text())["plan"]["accumulators"]["placement"], "device")
        self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_a_grid_of_its_own_and_little_memory(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        self.options = ["--division", "tiles", "--causal", "--threads", "1"]
        plan = self.path("plan.json")
        plan.write_text(self.succeed("plan", *self.inputs(), *self.options, "--lse", self.path("lse-o.npy"),
                                     "--device-memory", "3MiB", "--host-memory", "6MiB", "--json").stdout)
        self.options = ["--causal", "--threads", "1"]
        expected = self.alone("--plan", plan)
        for ranks in (2, 3):
            self.mpirun(ranks, self.command("--overwrite", "--plan", plan))
            self.assertEqual(self.bytes_of("o.npy"), expected)


# What is done when a rank is killed does not depend on the division: CI alone tries it again.
thorough = unittest.skipUnless("STREAM_CQSA_THOROUGH" in os.environ, "STREAM_CQSA_THOROUGH=1 tries kills, too")


@thorough
class KilledRanks(ranks_test.Disturbed):
    options = TILES
    shape = (1, 14000, 2, 64)
    test_stopped_and_continued_where_several_ranks_merge = None
    test_stopped_and_continued_on_other_ranks = None
    test_signals_to_all_ranks_and_damage = None


class Killed(checkpoint_test.Checkpoint):
    options = TILES
    survive = checkpoint_test.Kills.survive

    @thorough
    def test_killed_at_random_moments(self):
        self.survive(4)

    @thorough
    def test_killed_with_accumulators_in_the_file(self):
        self.survive(3, "--host-memory", "3MiB", "--scratch", self.folder)

    def test_another_division_is_refused(self):
        expected, _ = self.undisturbed()
        self.stopped_run()
        same = self.command()
        without = [word for word in same if word not in ("--division", "tiles", "--grid", "9x5")]
        self.refuse(*without, "--division", "cqs", names=["--division"])
        self.refuse(*without, "--chunks", "9", names=["--chunks"])
        self.refuse(*without, "--division", "tiles", "--grid", "5x9", names=["--grid", "9x5"])
        self.succeed(*without)
        self.assertEqual(self.bytes_of("o.npy"), expected)


if __name__ == "__main__":
    unittest.main()
