"""The plan that is predicted to be fastest: what `plan` says of it, and runs that take it."""

import json
import re
import unittest

import numpy as np

import checkpoint_test
from cli import CliTest, attention

SLOW_MERGES = {"merge_bytes_per_second": 1e6, "device_merge_bytes_per_second": 1e6}


class Plan(CliTest):

    shape = ["--backend", "cpu", "--threads", "1", "--input", "synthetic:1", "--shape", "1,20000,4,64",
             "--device-memory", "8MiB", "--host-memory", "1GiB"]

    def lines(self, *options):
        text = self.succeed("plan", *self.shape, *options).stdout
        self.assertNotIn("built-in", text)
        return text.splitlines()

    def plan(self, *options):
        return json.loads(self.succeed("plan", *self.shape, *options, "--json").stdout)

    def test_runners_up_and_smallest_budgets_are_printed(self):
        self.save_costs()
        lines = self.lines()
        first = next(i for i, line in enumerate(lines) if line.startswith("runners-up"))
        self.assertTrue(lines[first - 1].startswith("chosen "), lines)
        last = next(i for i, line in enumerate(lines) if line.startswith("smallest budgets"))
        self.assertLessEqual(last - first, 5)
        for line in lines[first:last]:
            self.assertRegex(line, r"(c = \d+|\d+x\d+ tiles), \d+ key/value heads? per group.*accumulators "
                                   r".*: .* s, (as long|[+-][0-9.]+%), bound by .* \(\d+%\)")
        budgets = re.search(r"device .* \((\d+) bytes\) with this host memory, host .* \((\d+) bytes\) with", lines[last])
        smallest = self.plan()["smallest_budget"]
        self.assertEqual([int(budget) for budget in budgets.groups()], [smallest["device"], smallest["host"]])

    def test_the_smallest_budgets_are_exact(self):
        for more in ([], ["--division", "tiles"]):
            smallest = self.plan(*more)["smallest_budget"]
            shape = self.shape[:-4] + more
            for device, host in ((smallest["device"], 1 << 30), (8 << 20, smallest["host"])):
                self.succeed("plan", *shape, "--device-memory", device, "--host-memory", host)
            self.refuse("plan", *shape, "--device-memory", smallest["device"] - 1, "--host-memory", 1 << 30,
                        names=["smallest"])
            self.refuse("plan", *shape, "--device-memory", 8 << 20, "--host-memory", smallest["host"] - 1,
                        names=["smallest"])

    def test_costs_decide(self):
        self.save_costs()
        plain = self.plan()
        self.save_costs(launch_seconds=1)
        few = self.plan()
        self.assertLess(few["predicted"]["seconds"], plain["predicted"]["seconds"] + few["subproblem_count"] * 1.1)
        self.assertLessEqual(few["subproblem_count"], plain["subproblem_count"])
        for plan in (plain, few):
            self.assertLessEqual(len(plan["alternatives"]), 5)
            for other in plan["alternatives"]:
                self.assertGreater(other["seconds"] * 1.1, plan["predicted"]["seconds"])

    def test_what_is_pinned_stays(self):
        self.save_costs(**SLOW_MERGES)
        plan = self.plan("--chunks", "31", "--heads-per-group", "3")
        self.assertEqual((plan["c"], plan["request"]["heads_per_group"]), (31, 3))
        for other in plan["alternatives"]:
            self.assertEqual((other["c"], other["heads_per_group"]), (31, 3))

    def test_a_chosen_plan_printed_and_read_back_is_the_same(self):
        for costs in ({}, SLOW_MERGES):
            self.save_costs(**costs)
            for division in ("cqs", "tiles", "auto"):
                plan = self.plan("--division", division)
                self.path("plan.json").write_text(json.dumps(plan))
                again = json.loads(self.succeed("plan", *self.shape[:-4], "--plan", self.path("plan.json"),
                                                "--json").stdout)
                for key in ("alternatives", "smallest_budget"):  # of what the options left open
                    del plan[key], again[key]
                self.assertEqual(plan, again)

    def test_several_workers(self):
        self.save_costs()
        alone, four = self.plan(), self.plan("--workers", "4")
        self.assertEqual(four["request"]["workers"], 4)
        self.assertLess(four["predicted"]["seconds"], 0.5 * alone["predicted"]["seconds"])
        self.assertNotIn("predicted_for_workers", alone)
        numbers = self.plan("--workers", "6")["predicted_for_workers"]
        self.assertEqual([number["workers"] for number in numbers], [1, 2, 4, 6])
        for number, plan in zip(numbers, (self.plan("--workers", "1"), None, four)):
            if plan:
                self.assertEqual({**plan["predicted"], "workers": plan["request"]["workers"]}, number)
        line = next(line for line in self.lines("--workers", "2") if line.startswith("workers "))
        self.assertRegex(line, r"1: [\d.]+ s, .*2: [\d.]+ s, bound by .*")
        self.refuse("plan", *self.shape, "--workers", "-1", names=["--workers"])

    def test_auto_division(self):
        self.save_costs()
        self.assertEqual(self.plan("--division", "auto")["division"], "cqs")
        self.save_costs(**SLOW_MERGES)
        self.assertEqual(self.plan()["division"], "cqs")
        auto = self.plan("--division", "auto")
        self.assertEqual(auto["division"], "tiles")
        self.assertEqual({other["division"] for other in auto["alternatives"]} - {"cqs", "tiles"}, set())
        for options in (["--chunks", "7"], ["--grid", "2x3"]):
            self.refuse("plan", *self.shape, "--division", "auto", *options, names=["--division auto"])


class Run(CliTest):

    def test_auto_runs_what_is_faster_and_is_right(self):
        arrays = self.save_inputs(shape=(1, 1500, 3, 64))
        for costs, division in (({"flop_per_second": 1e9}, "cqs"), (SLOW_MERGES, "tiles")):
            self.save_costs(**costs)
            self.succeed("run", *self.inputs(), "--backend", "cpu", "--threads", "1", "--causal", "--division", "auto",
                         "--device-memory", "2MiB", "--output", self.path("o.npy"), "--overwrite", "--quiet",
                         "--report", self.path("r.json"))
            np.testing.assert_allclose(np.load(self.path("o.npy")), attention(*arrays, causal=True)[0], atol=2e-5)
            report = json.loads(self.path("r.json").read_text())
            self.assertEqual(report["plan"]["division"], division)


class Continued(checkpoint_test.Checkpoint):
    """The checkpoint's plan is kept, whatever would be chosen by now."""

    options = ["--backend", "cpu", "--division", "auto", "--causal", "--threads", "1", "--device-memory", "3MiB"]

    def plan(self):
        done = self.succeed("plan", *self.inputs(), *self.options, "--lse", self.path("lse-o.npy"), "--checkpoint",
                            self.path("ckpt"), "--json")
        plan = json.loads(done.stdout)
        return [plan.get(key) for key in ("division", "c", "grid", "head_groups", "order")]

    def test_other_costs_continue_the_same_plan(self):
        self.save_costs()
        expected, _ = self.undisturbed()
        first = self.plan()
        ckpt = self.path("ckpt")
        for lose in (lambda: None, (ckpt / "plan.json").unlink):
            self.save_costs()
            self.stopped_run("--overwrite")
            lose()
            self.save_costs(**SLOW_MERGES)
            self.assertNotEqual(self.plan(), first)
            self.finish("--overwrite")
            self.check_finished(expected)

    def test_a_chosen_plan_is_made_again_by_default_costs(self):
        self.save_costs(**SLOW_MERGES)
        first = self.plan()
        self.assertEqual(first[0], "tiles")
        expected, _ = self.undisturbed()
        self.stopped_run()
        (self.path("ckpt") / "plan.json").unlink()
        self.save_costs()
        self.assertNotEqual(self.plan(), first)
        self.refuse(*self.command(), "--chunks", "7", names=["--chunks"])
        self.finish()
        self.check_finished(expected)
        plan = self.report()["plan"]
        self.assertEqual([plan.get(key) for key in ("division", "c", "grid", "head_groups", "order")], first)


if __name__ == "__main__":
    unittest.main()
