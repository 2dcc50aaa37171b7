"""--queries: some rows of a sequence, as a run of all of them gives them."""

import json
import unittest

import numpy as np

import checkpoint_test
import ranks_test
from cli import CliTest, attention, run_program


class Rows(CliTest):

    def run_rows(self, rows, *options, output="o.npy"):
        self.succeed("run", *self.inputs(), "--output", self.path(output), "--lse",
                     self.path("lse-" + output), "--overwrite", "--quiet", *options,
                     *(["--queries", rows] if rows else []))
        return np.load(self.path(output)).astype(np.float64), np.load(self.path("lse-" + output))

    def test_they_are_those_of_the_whole(self):
        for shape, kv_shape in [((2, 300, 4, 16), (2, 300, 2, 16)), ((1, 300, 2, 8), (1, 90, 2, 8)),
                                ((1, 90, 6, 24), (1, 400, 3, 24))]:
            arrays = self.save_inputs(shape=shape, kv_shape=kv_shape)
            length = shape[1]
            for mask in ([], ["--causal"]):
                expected, expected_lse = attention(*arrays, causal=bool(mask))
                all_rows, all_lse = self.run_rows(None, *mask)
                for (begin, end), division in [((0, 1), []), ((length - 1, length), ["--chunks", "7"]),
                                               ((17, 71), ["--chunks", "7"]), ((0, 64), ["--chunks", "5"]),
                                               ((30, length), ["--chunks", "12", "--heads-per-group", "1"])]:
                    with self.subTest(shape=shape, mask=mask, rows=(begin, end), division=division):
                        output, lse = self.run_rows(f"{begin}:{end}", *mask, *division)
                        self.assertEqual(output.shape, (shape[0], end - begin, *shape[2:]))
                        self.assertEqual(lse.shape, (shape[0], shape[2], end - begin))
                        np.testing.assert_allclose(output, expected[:, begin:end], atol=2e-6, rtol=0)
                        np.testing.assert_allclose(output, all_rows[:, begin:end], atol=2e-6, rtol=0)
                        np.testing.assert_allclose(lse, expected_lse[..., begin:end], atol=1e-5, rtol=1e-6)
                        np.testing.assert_allclose(lse, all_lse[..., begin:end], atol=1e-5, rtol=1e-6)

    def test_all_rows_are_the_same_bytes_as_without_the_option(self):
        self.save_inputs()
        self.run_rows(None, "--causal", output="all.npy")
        self.run_rows("0:200", "--causal")
        for name in ("o.npy", "lse-o.npy"):
            self.assertEqual(self.path(name).read_bytes(),
                             self.path(name.replace("o.npy", "all.npy")).read_bytes())

    def test_layouts_and_ranks(self):
        arrays = self.save_inputs(shape=(2, 3, 70, 8))
        output, _ = self.run_rows("20:50", "--layout", "bhsd", "--causal", "--chunks", "5")
        expected = attention(*[array.transpose(0, 2, 1, 3) for array in arrays], causal=True)[0]
        np.testing.assert_allclose(output, expected.transpose(0, 2, 1, 3)[:, :, 20:50], atol=2e-6)
        for shape in [(50, 8), (50, 3, 8)]:
            arrays = self.save_inputs(shape=shape)
            output, _ = self.run_rows("7:9")
            expected = attention(*[array.reshape(1, 50, -1, 8) for array in arrays])[0]
            self.assertEqual(output.shape, (2, *shape[1:]))
            np.testing.assert_allclose(output.reshape(1, 2, -1, 8), expected[:, 7:9], atol=2e-6)

    def test_small_memory(self):
        arrays = self.save_inputs(shape=(1, 3000, 2, 16))
        output, _ = self.run_rows("1000:2500", "--causal", "--device-memory", "2MiB", "--host-memory",
                                  "1MiB", "--scratch", self.folder)
        np.testing.assert_allclose(output, attention(*arrays, causal=True)[0][:, 1000:2500], atol=2e-6)

    def test_rows_without_a_key(self):
        arrays = self.save_inputs(shape=(1, 300, 1, 8), kv_shape=(1, 40, 1, 8))
        output, lse = self.run_rows("250:270", "--causal", "--chunks", "3")
        self.assertTrue(np.all(output[0, :10] == 0))
        self.assertTrue(np.all(np.isneginf(lse[..., :10])))
        np.testing.assert_allclose(output, attention(*arrays, causal=True)[0][:, 250:270], atol=2e-6)
        output, lse = self.run_rows("0:100", "--causal", "--chunks", "3")  # nothing to compute
        self.assertTrue(np.all(output == 0) and np.all(np.isneginf(lse)))

    def test_the_report_counts_these_rows_alone(self):
        self.save_inputs(shape=(1, 200, 2, 16))
        self.run_rows("150:180", "--causal", "--report", self.path("r.json"))
        report = json.loads(self.path("r.json").read_text())
        certificate = report["certificate"]
        self.assertEqual(sum(certificate["scores_merged"]), 2 * sum(range(151, 181)))
        self.assertEqual(certificate["scores_merged"], certificate["scores_kept_by_mask"])
        self.assertEqual(certificate["query"]["vectors"], 30 * 2)
        self.assertEqual(certificate["output"]["vectors"], 30 * 2)
        problem = report["plan"]["problem"]
        self.assertEqual([problem[name] for name in ("query_length", "queries_before", "queries_after")],
                         [30, 150, 20])

    def test_synthetic(self):
        shape = ["--input", "synthetic:5", "--shape", "1,300,4,16", "--kv-heads", "2", "--dtype", "f32",
                 "--causal", "--quiet", "--no-verify"]
        self.succeed("run", *shape, "--output", self.path("all.npy"))
        self.succeed("run", *shape, "--output", self.path("o.npy"), "--queries", "40:75")
        np.testing.assert_allclose(np.load(self.path("o.npy")), np.load(self.path("all.npy"))[:, 40:75],
                                   atol=2e-6)

    def test_verify(self):
        self.save_inputs(shape=(1, 100, 2, 8))
        self.run_rows("60:80", "--causal")
        options = [*self.inputs(), "--causal", "--output", self.path("o.npy"), "--lse", self.path("lse-o.npy"),
                   "--rows", "40"]
        self.succeed("verify", *options, "--queries", "60:80")
        self.assertIn("FAILED", self.fail_to_verify(*options, "--queries", "61:81"))
        self.refuse("verify", *options, names=["[1, 20, 2, 8]", "[1, 100, 2, 8]", "--queries BEGIN:END"])
        self.refuse("verify", *options, "--queries", "60:79", names=["[1, 19, 2, 8]"])
        output = np.load(self.path("o.npy"))
        output[0, 7, 1, 3] += 1e-2
        np.save(self.path("o.npy"), output)
        self.assertIn("token 7, head 1", self.fail_to_verify(*options, "--queries", "60:80"))

    def fail_to_verify(self, *options):
        done = run_program("verify", *options)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        return done.stdout

    def test_plans(self):
        self.save_inputs()
        options = [*self.inputs(), "--causal", "--chunks", "5", "--queries", "31:99"]
        text = self.succeed("plan", *options, "--json").stdout
        self.path("plan.json").write_text(text)
        self.assertIn("query rows 31:99 of 200 and 200 key tokens", self.succeed("plan", *options).stdout)
        self.succeed("plan", *options, "--svg", self.path("plan.svg"))
        rest = ["--causal", "--plan", self.path("plan.json"), "--output", self.path("p.npy"), "--quiet"]
        self.succeed("run", *self.inputs(), "--queries", "31:99", *rest)
        self.run_rows("31:99", "--causal", "--chunks", "5")
        self.assertEqual(self.path("p.npy").read_bytes(), self.path("o.npy").read_bytes())
        self.path("p.npy").unlink()
        for rows in ("32:100", "31:98"):
            self.refuse("run", *self.inputs(), "--queries", rows, *rest, names=["plan.json", "quer"])
        self.refuse("run", *self.inputs(), *rest, names=["plan.json", "query_length 68, the input has 200"])

    def test_hostile_values(self):
        self.save_inputs(shape=(1, 20, 2, 8))
        self.path("o.npy").write_bytes(b"")
        for rows in ("5", "7:3", "4:4", "0:21", "20:21", "-1:5", "0:-5", ":", "5:", ":5", " 1:2", "1:2 ", "+1:2",
                     "1:2:3", "1-2", "0x1:0x2", "1.0:2.0", "a:b", "0:9223372036854775808",
                     "99999999999999999999:5", "0:18446744073709551617"):
            self.refuse("plan", *self.inputs(), f"--queries={rows}",
                        names=["--queries", f"'{rows}'", "20 tokens", "0 <= BEGIN < END <= 20"])
        for command in (["run", "--output", self.path("new.npy")], ["verify", "--output", self.path("o.npy")]):
            self.refuse(*command, *self.inputs(), "--queries", "7:3", names=["'7:3'", "END <= 20"])
        self.refuse("plan", *self.inputs(), "--queries=", names=["queries"])
        self.refuse("plan", *self.inputs(), "--queries", "-1:5", names=["queries"])
        self.refuse("plan", *self.inputs(), "--queries", names=["queries"])
        self.refuse("plan", *self.inputs(), "--queries", "1:2", "--queries", "3:4", names=["queries"])
        self.assertFalse(self.path("new.npy").exists())


class RowsOnRanks(ranks_test.Ranks):

    options = ["--chunks", "13", "--causal", "--threads", "1", "--queries", "2100:5300", "--overwrite"]

    def test_bytes_are_those_of_one_rank(self):
        self.save_inputs(shape=(1, 6000, 2, 32), kv_shape=(1, 6000, 1, 32))
        expected = self.alone()
        self.assertEqual(np.load(self.path("expected.npy")).shape, (1, 3200, 2, 32))
        for extra in ([], ["--input-through-master"], ["--mergers", "1"]):
            with self.subTest(extra=extra):
                self.mpirun(3, self.command(*extra, "--report", self.path("r.json")))
                self.assertEqual(self.bytes_of("o.npy"), expected)
                self.assertTrue(json.loads(self.path("r.json").read_text())["certificate"]["ok"])

    def test_against_the_definition(self):
        arrays = self.save_inputs(shape=(1, 900, 4, 16), kv_shape=(1, 1100, 2, 16))
        for mask in ([], ["--causal"]):
            for extra in ([], ["--input-through-master"]):
                self.options = ["--chunks", "7", *mask, "--queries", "333:777", "--overwrite", *extra]
                self.mpirun(3, self.command())
                expected = attention(*arrays, causal=bool(mask))[0][:, 333:777]
                np.testing.assert_allclose(np.load(self.path("o.npy")), expected, atol=2e-6)

    def test_ranks_that_want_other_rows_are_refused(self):
        self.save_inputs(shape=(1, 900, 2, 32))
        self.options = ["--causal", "--overwrite"]
        for other, rows in ((["--queries", "4:10"], "[4,6]"), ([], "[0,900]")):
            error = self.mpirun((1, 2), self.command("--queries", "3:9"), self.command(*other), status=2)
            self.assertIn(f"rank 1: its query rows are {rows} and rank 0's [3,6]", error)
            self.assertFalse(self.path("o.npy").exists())


class FewRowsOfManyKeys(CliTest):
    """Rows so few beside the keys that all of them fit the device while the keys stream past."""

    options = ["--input", "synthetic:2", "--shape", "1,40000,2,32", "--dtype", "f32", "--causal", "--queries",
               "39000:40000", "--device-memory", "4MiB", "--host-memory", "8MiB"]

    def command(self, *extra, output="o.npy"):
        return ["run", *self.options, "--output", self.path(output), "--lse", self.path("lse-" + output), "--quiet",
                *extra]

    def bytes_of(self, output):
        return self.path(output).read_bytes(), self.path("lse-" + output).read_bytes()

    def test_every_key_is_loaded_once(self):
        self.succeed(*self.command("--report", self.path("r.json")))
        report = json.loads(self.path("r.json").read_text())
        self.assertEqual(report["plan"]["division"], "tiles")
        rows, columns = report["plan"]["grid"]
        self.assertEqual(rows, 1)
        self.assertGreater(columns, 1)
        queries, keys = 1000 * 2 * 32 * 4, 40000 * 2 * 32 * 4
        self.assertEqual(report["stages"]["copy in"]["bytes"], queries + 2 * keys)
        self.assertEqual(report["stages"]["read"]["bytes"], queries + 2 * keys)
        certificate = report["certificate"]
        self.assertEqual(certificate["scores_merged"], certificate["scores_kept_by_mask"])
        self.succeed("verify", *self.options[:9], "--output", self.path("o.npy"), "--lse", self.path("lse-o.npy"),
                     "--quiet")

    def test_another_division_may_be_asked_for(self):
        for options in (["--division", "cqs"], ["--chunks", "133"]):
            plan = json.loads(self.succeed("plan", *self.options, *options, "--json").stdout)
            self.assertEqual(plan["division"], "cqs")
        whole = [option for option in self.options if option not in ("--queries", "39000:40000")]
        self.assertEqual(json.loads(self.succeed("plan", *whole, "--json").stdout)["division"], "cqs")

    def test_stopped_in_time_and_continued(self):
        durable = ["--checkpoint", self.path("ckpt"), "--checkpoint-interval", "0.01"]
        self.succeed(*self.command(*durable, output="expected.npy"))
        # However far it comes in that time.
        stopped = run_program(*self.command(*durable, "--max-hours", "2e-5"))
        self.assertIn(stopped.returncode, (0, 75), stopped.stderr)
        if stopped.returncode == 75:
            self.succeed(*self.command(*durable))
        self.assertEqual(self.bytes_of("o.npy"), self.bytes_of("expected.npy"))


class RowsWithACheckpoint(checkpoint_test.Checkpoint):

    options = [*checkpoint_test.Checkpoint.options, "--queries", "1000:11000"]

    def test_stopped_and_continued(self):
        expected, _ = self.undisturbed()
        self.stopped_run()
        self.finish()
        self.check_finished(expected)
        self.assertGreater(self.report()["checkpoint"]["resumed_from"], 0)

    def test_other_rows_are_refused(self):
        self.stopped_run()
        for rows in ("1000:10999", "1001:11000", "999:10999", "0:12000"):
            self.options = [*checkpoint_test.Checkpoint.options, "--queries", rows]
            self.refuse(*self.command(), names=["belongs to another run", "--queries was \"1000:11000\"", rows])
        self.options = checkpoint_test.Checkpoint.options
        self.refuse(*self.command(), names=["--queries was \"1000:11000\" and is \"0:12000\""])


if __name__ == "__main__":
    unittest.main()
