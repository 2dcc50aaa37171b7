"""Runs in which several ranks merge: the bytes of one."""

import json
import unittest

import numpy as np

import ranks_test


class Mergers(ranks_test.Ranks):

    def compare(self, expected, ranks, mergers, *extra):
        with self.subTest(ranks=ranks, mergers=mergers):
            path = self.path("r.json")
            self.mpirun(ranks, self.command("--overwrite", "--mergers", mergers, "--report", path,
                                            *extra))
            self.assertEqual(self.bytes_of("o.npy"), expected)
            return json.loads(path.read_text())

    def test_bytes_and_certificate_do_not_depend_on_mergers(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone("--report", self.path("alone.json"))
        certificate = json.loads(self.path("alone.json").read_text())["certificate"]
        for ranks, mergers in ((3, 1), (4, 2), (7, 3), (16, 14)):
            report = self.compare(expected, ranks, mergers)
            for name in ("ok", "scores_merged", "rows", "output"):
                self.assertEqual(report["certificate"][name], certificate[name])
            self.assertEqual(report["ranks"], ranks)
            self.assertEqual([merger["rank"] for merger in report["mergers"]],
                             list(range(1, mergers + 1)))
            self.assertEqual([worker["rank"] for worker in report["workers"]],
                             list(range(mergers + 1, ranks)))
            ends = [0] + [merger["chunks"][0] for merger in report["mergers"]] + [13]
            self.assertEqual(ends[1:-1], sorted(ends[1:-1]))
            self.assertEqual([merger["chunks"][1] for merger in report["mergers"]], ends[2:])
            for merger in report["mergers"]:
                self.assertLessEqual(merger["host_bytes"], merger["host_budget"])
                self.assertEqual(merger["bytes_written"] > 0,
                                 merger["chunks"][0] < merger["chunks"][1])

    def test_layouts_head_groups_and_dtypes(self):
        self.save_inputs(shape=(2, 1500, 4, 32), kv_shape=(2, 1100, 2, 32), dtype=np.float32)
        for options in (["--heads-per-group", "1"], ["--output-dtype", "f64"], []):
            self.options = ["--chunks", "7", *options]
            self.compare(self.alone("--overwrite"), 4, 2)
        self.save_inputs(shape=(2, 4, 1500, 32), dtype=np.float32)
        for options in (["--heads-per-group", "1"], []):
            self.options = ["--chunks", "7", "--layout", "bhsd", *options]
            self.compare(self.alone("--overwrite"), 5, 3)

    def test_safetensors_and_rank_2(self):
        for name, array in zip("qkv", self.save_inputs(shape=(3000, 48))):
            np.save(self.path(f"{name}.npy"), array)
        self.options = ["--chunks", "7"]
        expected = self.alone()
        self.compare(expected, 3, 1)
        self.succeed("run", *self.inputs(), *self.options, "--output", self.path("e.safetensors"),
                     "--quiet")
        self.mpirun(4, ["run", *self.inputs(), *self.options, "--output",
                        self.path("o.safetensors"), "--quiet", "--mergers", "2"])
        self.assertEqual(self.path("o.safetensors").read_bytes(),
                         self.path("e.safetensors").read_bytes())

    def test_memory_that_is_too_small_for_one_rank_is_enough_for_several(self):
        self.save_inputs(shape=(1, 20000, 1, 64), dtype=np.float16)
        self.options = ["--chunks", "57", "--threads", "1"]
        expected = self.alone()
        small = self.command("--overwrite", "--host-memory", "4MiB")
        error = self.mpirun(3, small, status=2)
        self.assertIn("host memory", error)
        report = self.compare(expected, 5, 3, "--host-memory", "4MiB")
        for merger in report["mergers"]:
            self.assertLessEqual(merger["host_bytes"], 4 << 20)

    def test_a_plan_for_mergers(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        plan = self.path("plan.json")
        plan.write_text(self.succeed("plan", *self.inputs(), *self.options, "--lse", "lse.npy",
                                     "--mergers", "2", "--workers", "2", "--json").stdout)
        self.options = ["--causal", "--threads", "1", "--plan", plan]
        for ranks, mergers in ((5, 2), (4, 1), (6, 3), (3, 0)):
            self.compare(expected, ranks, mergers)
        self.refuse(*self.command("--overwrite"), names=["plan", "2 merge"])

    def test_too_few_ranks(self):
        self.save_inputs(shape=(1, 50, 2, 16))
        self.assertIn("start 4 ranks or more",
                      self.mpirun(3, self.command("--mergers", "2"), status=2))
        self.assertIn("--mergers must not be negative",
                      self.mpirun(3, self.command("--mergers", "-1"), status=2))
        self.refuse(*self.command("--mergers", "1"), names=["--mergers", "mpirun"])
        self.refuse("plan", *self.inputs(), "--mergers", "1", names=["--mergers", "--workers"])

    def test_a_merger_that_does_not_see_the_output_is_named(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        common = self.command("--mergers", "1")
        other = self.command("--mergers", "1", output="other.npy")
        error = self.mpirun((1, 1, 1), common, other, common, status=2)
        lines = [line for line in error.splitlines() if line.startswith("stream-cqsa:")]
        self.assertEqual(len(lines), 1, error)
        for text in ("rank 1: ", "other.npy", "share"):
            self.assertIn(text, lines[0])
        self.assertFalse(list(self.folder.glob("*.partial")))

    def test_a_merger_with_too_little_memory_is_named(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        common = self.command("--mergers", "1")
        error = self.mpirun((1, 1, 1), common, [*common, "--host-memory", "64KiB"], common,
                            status=2)
        self.assertIn("rank 1: host memory", error)


if __name__ == "__main__":
    unittest.main()
