"""rehearse: some subproblems of a run's plan, computed and checked before the run is paid for."""

import json
import os
import random
import signal
import subprocess
import unittest

from cli import PROGRAM, CliTest, run_program

SYNTHETIC = ["--input", "synthetic:1", "--shape", "1,3000,4,16", "--kv-heads", "2", "--dtype", "f32"]


class Rehearse(CliTest):

    def rehearse(self, *options):
        """What it prints, and its report."""
        done = self.succeed("rehearse", *options, "--quiet", "--report", self.path("r.json"))
        report = json.loads(self.path("r.json").read_text())
        self.path("r.json").unlink()
        return done.stdout, report

    def test_masks_and_head_groups(self):
        for mask in ([], ["--causal"]):
            for division in (["--chunks", "13"], ["--chunks", "13", "--heads-per-group", "1"],
                             ["--division", "tiles", "--grid", "6x6"]):
                with self.subTest(mask=mask, division=division):
                    text, report = self.rehearse(*SYNTHETIC, *mask, *division, "--rows", "4")
                    heads = 2 if "--heads-per-group" in division else 4
                    self.assertIn(f"verified: {3 * 4 * heads} rows of 3 subproblems\n", text)
                    self.assertEqual(text.count(" against fp64; "), 3)
                    self.assertTrue(report["ok"])
                    self.check_subproblems(report, heads)

    def check_subproblems(self, report, heads):
        ids = [each["id"] for each in report["subproblems"]]
        self.assertEqual(ids, sorted(set(ids)))
        self.assertEqual(ids[0], 0)
        self.assertEqual(ids[-1], report["plan"]["subproblem_count"] - 1)
        for each in report["subproblems"]:
            self.assertEqual(len(each["rows"]["rows"]), 4 * heads)
            self.assertTrue(each["rows"]["ok"])
            self.assertEqual(each["flop"], 4 * 16 * each["scores"])
            self.assertGreater(each["kernel_seconds"], 0)
        total = sum(each["flop"] for each in report["subproblems"])
        seconds = sum(each["kernel_seconds"] for each in report["subproblems"])
        self.assertAlmostEqual(report["flop_per_second"] / (total / seconds), 1)
        for name in ("predicted", "predicted_at_that_rate"):
            self.assertGreater(report[name]["seconds"], 0)

    def test_all_subproblems_have_all_scores(self):
        _, report = self.rehearse(*SYNTHETIC, "--causal", "--chunks", "7", "--subproblems", "100", "--rows", "1")
        self.assertEqual([each["id"] for each in report["subproblems"]], list(range(7)))
        self.assertEqual(sum(each["scores"] for each in report["subproblems"]), 4 * 3000 * 3001 // 2)

    def test_the_plan_is_that_of_the_run(self):
        options = [*SYNTHETIC, "--causal", "--device-memory", "2MiB", "--host-memory", "4MiB"]
        for more in ([], ["--checkpoint", self.path("ckpt")], ["--lse", self.path("lse.npy")]):
            text, report = self.rehearse(*options, *more, "--rows", "1")
            self.clear_checkpoint()
            plan = json.loads(self.succeed("plan", *options, *more, "--json").stdout)
            self.assertEqual(report["plan"], {key: plan[key] for key in report["plan"]})
            self.assertIn(f"c = {report['plan']['c']} chunks", text)
            self.assertLessEqual(report["memory"]["host"], 4 << 20)
            self.assertLessEqual(report["memory"]["device"], 2 << 20)
        self.assertEqual(list(self.folder.iterdir()), [])  # no output

    def clear_checkpoint(self):
        """What is left of a checkpoint when all has ended well: the directory."""
        if self.path("ckpt").exists():
            self.path("ckpt").rmdir()

    def test_files(self):
        self.save_inputs(shape=(2, 300, 4, 16), kv_shape=(2, 300, 2, 16))
        text, report = self.rehearse(*self.inputs(), "--causal", "--chunks", "5", "--output", self.path("o.npy"))
        self.assertIn(" read, accumulators: ", text)
        self.assertEqual({each["batch"] for each in report["subproblems"]}, {0, 1})
        self.assertEqual(report["whole_run"]["output_bytes"], 2 * 300 * 4 * 16 * 4)
        self.assertFalse(self.path("o.npy").exists())

    def test_accumulators_that_do_not_fit_are_said(self):
        options = [*SYNTHETIC, "--chunks", "21", "--device-memory", "2MiB", "--host-memory", "384KiB"]
        self.refuse("run", *options, "--output", self.path("o.npy"), names=["with --scratch"])
        text, report = self.rehearse(*options, "--rows", "2")
        self.assertIn("the run needs --scratch DIR", text)
        whole = report["whole_run"]
        self.assertTrue(whole["lacks_scratch"])
        self.assertGreaterEqual(whole["accumulator_bytes"]["file"], 3000 * 2 * (16 + 2) * 4)
        self.assertLessEqual(report["memory"]["host"], 384 << 10)
        text, report = self.rehearse(*options, "--rows", "2", "--scratch", self.folder)
        self.assertNotIn("the run needs", text)
        self.assertFalse(report["whole_run"]["lacks_scratch"])

    def test_parts_of_subproblems(self):
        refused = self.refuse("rehearse", *SYNTHETIC, "--chunks", "21", "--device-memory", "1KiB",
                              names=["device memory", "the smallest budget that works"])
        smallest = refused.split(" bytes)")[0].split("(")[-1]
        text, report = self.rehearse(*SYNTHETIC, "--chunks", "21", "--device-memory", smallest)
        self.assertIn("in parts of up to 1 query chunk", text)
        self.assertTrue(report["ok"])

    def test_only(self):
        _, report = self.rehearse(*SYNTHETIC, "--chunks", "7", "--only", "5,2")
        self.assertEqual([each["id"] for each in report["subproblems"]], [2, 5])
        for bad in ("7", "-1", "1,x", "1,"):
            self.refuse("rehearse", *SYNTHETIC, "--chunks", "7", f"--only={bad}", names=["--only", "from 0 to 6"])
        self.refuse("rehearse", *SYNTHETIC, "--causal", "--division", "tiles", "--grid", "4x4", "--only", "3",
                    names=["subproblem 3 nothing to compute"])

    def test_refusals(self):
        for option in ("--subproblems", "--rows"):
            self.refuse("rehearse", *SYNTHETIC, option, "0", names=[option, "use 1 to"])
        self.refuse("rehearse", *SYNTHETIC, "--mergers", "1", names=["--mergers"])
        self.refuse("rehearse", *SYNTHETIC, "--scratch", self.path("none"), names=["--scratch"])
        self.refuse("rehearse", names=["no input"])
        self.path("r.json").write_text("")
        self.refuse("rehearse", *SYNTHETIC, "--report", self.path("r.json"), names=["exists"])
        self.refuse("rehearse", *SYNTHETIC, "--causal", "--key-length", "10", "--queries", "0:20",
                    names=["nothing to compute"])

    KEPT = [*SYNTHETIC, "--causal", "--chunks", "57", "--subproblems", "40", "--rows", "1"]

    def interrupt(self, number, after, *more):
        """Ends a rehearsal with a checkpoint by a signal once it has said `after` subproblems. Returns
        its exit status, and what it said on standard error."""
        command = [PROGRAM, "rehearse", *self.KEPT, "--quiet", "--checkpoint", self.path("ckpt"), *more]
        # That pipe holds about 17 lines: it waits at the next for those to be read.
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, pipesize=4096)
        while after > 0 and (line := process.stdout.readline()):
            after -= line.startswith("subproblem ")
        process.send_signal(number)
        said = process.communicate(timeout=100)[1]
        return process.returncode, said

    def tried(self, report):
        """What does not depend on time."""
        return [{name: value for name, value in each.items() if "second" not in name}
                for each in report["subproblems"]]

    def continued(self, *more):
        text, report = self.rehearse(*self.KEPT, "--checkpoint", self.path("ckpt"), *more)
        self.clear_checkpoint()
        return text, report

    def test_what_was_tried_is_kept(self):
        text, expected = self.rehearse(*self.KEPT)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            with self.subTest(number=number):
                for after in (2, 7):
                    status, said = self.interrupt(number, after)
                    self.assertEqual(status, -9 if number == signal.SIGKILL else 75, said)
                    if after == 7:
                        self.assertIn("stream-cqsa: continuing from the checkpoint in ", said)
                    if number != signal.SIGKILL:
                        self.assertIn("of 40 subproblems, ", said)
                        self.assertIn(" now; the same command continues from the checkpoint in ", said)
                lines = (self.path("ckpt") / "tried").read_text().splitlines()
                self.assertGreaterEqual(len(lines), 7)
                kept = [json.loads(line)["tried"] for line in lines]
                continued, report = self.continued()
                self.assertEqual(self.tried(report), self.tried(expected))
                self.assertEqual(report["subproblems"][:len(kept)], kept)  # with their seconds
                self.assertEqual(continued.splitlines()[-1], text.splitlines()[-1])

    def test_more_subproblems_continue_what_was_tried(self):
        self.assertEqual(self.interrupt(signal.SIGTERM, 3)[0], 75)
        lines = (self.path("ckpt") / "tried").read_text().splitlines()
        kept = [json.loads(line)["tried"] for line in lines]
        _, report = self.continued("--only", "0,5,56")
        self.assertEqual([each["id"] for each in report["subproblems"]], [0, 5, 56])
        self.assertEqual(report["subproblems"][0], kept[0])

    def test_the_time_that_is_given(self):
        done = run_program("rehearse", *self.KEPT, "--quiet", "--checkpoint", self.path("ckpt"), "--max-hours", "1e-9")
        self.assertEqual(done.returncode, 75, done.stderr)
        self.assertIn("stopped after 0 of 40 subproblems, 0 of them now; ", done.stderr)
        _, report = self.continued("--max-hours", "1")
        self.assertTrue(report["ok"])
        self.refuse("rehearse", *self.KEPT, "--max-hours", "1", names=["--max-hours", "--checkpoint"])

    def test_damage_is_found(self):
        _, expected = self.rehearse(*self.KEPT)
        chance = random.Random(5)
        for trial in range(6):
            self.assertEqual(self.interrupt(signal.SIGTERM, 4)[0], 75)
            kept = self.path("ckpt") / "tried"
            data = bytearray(kept.read_bytes())
            if trial % 2:
                del data[chance.randrange(1, len(data)):-1]
            else:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            kept.write_bytes(data)
            done = self.succeed("rehearse", *self.KEPT, "--quiet", "--checkpoint", self.path("ckpt"), "--report",
                                self.path("r.json"))
            self.assertIn("is damaged: ", done.stderr)
            self.assertEqual(self.tried(json.loads(self.path("r.json").read_text())), self.tried(expected))
            self.path("r.json").unlink()

    def test_another_s_checkpoint_is_refused(self):
        self.assertEqual(self.interrupt(signal.SIGTERM, 2)[0], 75)
        there = ["--checkpoint", self.path("ckpt")]
        run = [*SYNTHETIC, "--causal", "--chunks", "57", *there]
        self.refuse("run", *run, "--output", self.path("o.npy"), names=["another run", "command was"])
        self.refuse("rehearse", *run, "--rows", "3", names=["another run", "--rows was 1 and is 3"])
        self.refuse("rehearse", *run, "--rows", "1", "--scale", "2", names=["another run", "--scale"])
        self.continued()

    def test_several_ranks_are_refused(self):
        environment = {name: value for name, value in os.environ.items()
                       if name != "OMPI_MCA_ess_singleton_isolated"}
        done = subprocess.run(["mpirun", "-n", "2", PROGRAM, "rehearse", *SYNTHETIC], capture_output=True,
                              text=True, timeout=100, env=environment)
        self.assertNotEqual(done.returncode, 0)
        said = [line for line in done.stderr.splitlines() if line.startswith("stream-cqsa: ")]
        self.assertEqual(len(said), 1, done.stderr)
        self.assertIn("one rank", said[0])

    def test_help(self):
        self.assertIn("--subproblems", self.succeed("rehearse", "--help").stdout)
        self.assertIn("rehearse", run_program("--help").stdout)


if __name__ == "__main__":
    unittest.main()
