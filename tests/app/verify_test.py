"""What stream-cqsa verify and a run's own certificate say of right, wrong and incomparable rows."""

import json
import os
import pty
import subprocess
import unittest

import numpy as np

from cli import PROGRAM, CliTest, run_program


class VerifyTest(CliTest):

    def save(self, scale=1.0):
        """Saves inputs, Q and K `scale` times larger, and computes O and lse, unverified."""
        query, key, _ = self.save_inputs(shape=(2, 40, 2, 8))
        np.save(self.path("q.npy"), query * np.float32(scale))
        np.save(self.path("k.npy"), key * np.float32(scale))
        self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("lse.npy"),
                     "--quiet", "--no-verify")

    def verify(self, *options):
        return run_program("verify", *self.inputs(), "--output", self.path("o.npy"), *options)

    def damage(self, name, place, value):
        """Changes one element of a file."""
        array = np.load(self.path(name))
        array[place] = value
        np.save(self.path(name), array)


class Verify(VerifyTest):

    def test_a_wrong_element_is_found(self):
        self.save()
        right = np.load(self.path("o.npy"))
        for wrong in (right[1, 17, 0, 2] + 1e-2, np.nan, np.inf, -np.inf):
            self.damage("o.npy", (1, 17, 0, 2), wrong)
            done = self.verify("--rows", "160")
            self.assertEqual(done.returncode, 1)
            self.assertIn("FAILED", done.stdout)
            self.assertIn("batch 1, token 17, head 0", done.stdout)
            self.assertNotIn("all rows", done.stdout)
            self.assertIn("; these are all rows\n", self.verify("--rows", "161").stdout)

    def test_a_wrong_lse_is_found(self):
        self.save()
        lse = ["--lse", self.path("lse.npy")]
        done = self.verify("--rows", "160", *lse)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("lse: worst at", done.stdout)
        right = np.load(self.path("lse.npy"))[1, 1, 31]
        # log2 instead of the natural logarithm is wrong, too.
        for wrong in (right + 1e-3, right / np.log(2), np.nan, np.inf, -np.inf):
            self.damage("lse.npy", (1, 1, 31), wrong)
            self.assertEqual(self.verify("--rows", "160").returncode, 0)
            done = self.verify("--rows", "160", *lse)
            self.assertEqual(done.returncode, 1)
            self.assertIn("lse: worst at batch 1, token 31, head 1", done.stdout)

    def test_rows_without_a_key_have_an_lse_of_minus_infinity(self):
        self.save_inputs(shape=(1, 50, 1, 8), kv_shape=(1, 20, 1, 8))
        outputs = ["--output", self.path("o.npy"), "--lse", self.path("lse.npy")]
        self.succeed("run", *self.inputs(), "--causal", *outputs, "--quiet")
        options = ["--causal", "--rows", "50", "--lse", self.path("lse.npy")]
        self.assertEqual(self.verify(*options).returncode, 0)
        for wrong in (np.nan, np.inf, 0):
            self.damage("lse.npy", (0, 0, 4), wrong)
            self.assertEqual(self.verify(*options).returncode, 1)

    def test_files_that_are_not_an_lse(self):
        self.save()
        self.refuse("verify", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("o.npy"),
                    names=["o.npy", "[2, 2, 40]"])
        np.save(self.path("short.npy"), np.zeros((2, 2, 39), np.float32))
        self.refuse("verify", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("short.npy"),
                    names=["short.npy"])
        self.refuse("verify", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("none.npy"),
                    names=["none.npy"])

    def test_an_lse_in_a_safetensors_file(self):
        self.save_inputs(shape=(30, 3, 8))
        outputs = ["--output", self.path("o.safetensors"), "--lse", self.path("lse.safetensors")]
        self.succeed("run", *self.inputs(), *outputs, "--quiet")
        self.assertIn("lse", self.succeed("verify", *self.inputs(), *outputs).stdout)

    def test_sampled_rows(self):
        self.save()
        places = lambda *options: [(row["batch"], row["token"], row["head"])
                                   for row in json.loads(self.verify("--json", *options).stdout)["rows"]]
        some = places("--rows", "50")
        self.assertEqual(some[:2], [(0, 0, 0), (1, 39, 1)])
        self.assertEqual(len(set(some)), 50)
        self.assertEqual(some, places("--rows", "50"))
        self.assertEqual(some[:20], places("--rows", "20"))
        self.assertNotEqual(some, places("--rows", "50", "--seed", "3"))
        every = places("--rows", "1000")
        self.assertEqual(len(every), 160)
        self.assertEqual(len(set(every)), 160)
        self.assertEqual(places("--rows", "1"), [(0, 0, 0)])

    def test_absurd_numbers_of_rows_are_refused(self):
        # A row over 2^30 keys of 128 elements takes 2^37 steps: 32 of them are the default, and the most.
        np.save(self.path("zero.npy"), np.zeros((1, 64, 1, 128), np.float16))
        options = ["--input", "synthetic:1", "--shape", "1,64,1,128", "--key-length", str(2**30), "--output",
                   self.path("zero.npy")]
        for rows in ("33", "1000000000", str(2**63 - 1)):
            self.refuse("verify", *options, "--rows", rows, names=[f"--rows {rows}", "1073741824 x 128", "1 to 32"])
        for rows in ("0", "-1"):
            self.refuse("verify", *options, "--rows", rows, names=[f"--rows {rows}", "1 to 32"])
        # More than there are is no harm.
        self.save()
        self.assertEqual(self.verify("--rows", str(2**63 - 1)).returncode, 0)

    def test_progress_goes_to_standard_error_unless_quiet(self):
        self.save()
        for quiet in (False, True):
            terminal, end = pty.openpty()
            with open(terminal, "rb", buffering=0) as shown:
                command = [PROGRAM, "verify", *self.inputs(), "--output", self.path("o.npy")]
                done = subprocess.run([*map(str, command), *(["--quiet"] if quiet else [])], stderr=end,
                                      stdout=subprocess.PIPE, text=True, timeout=250)
                os.write(end, b"END")
                os.close(end)
                text = b""
                while not text.endswith(b"END"):
                    text += shown.read(4096)
            self.assertEqual(done.returncode, 0)
            self.assertTrue(done.stdout.startswith("verified: 32 rows"), done.stdout)
            if quiet:
                self.assertEqual(text, b"END")
            else:
                self.assertIn(b"100.0%  32 rows against fp64", text)


class NotComparable(VerifyTest):
    """Rows in which fp32 may overflow have no bound: they are neither right nor wrong."""

    def overflow_values(self, columns):
        """Makes V so large that its sums leave fp32 in batch entry 1, or in both."""
        value = np.load(self.path("v.npy"))
        value[columns] = np.abs(value[columns]) * np.float32(1e37)
        np.save(self.path("v.npy"), value)
        self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("lse.npy"),
                     "--quiet", "--overwrite", "--report", self.path("r.json"))
        self.assertFalse(np.isnan(np.load(self.path("o.npy"))).any())
        return json.loads(self.path("r.json").read_text())["certificate"]

    def test_are_counted_apart(self):
        self.save()
        rows = self.overflow_values(1)["rows"]
        apart = sum(row["batch"] == 1 for row in rows["rows"])
        self.assertEqual((rows["compared"], rows["not_comparable"]), (len(rows["rows"]) - apart, apart))
        self.assertGreater(apart, 0)
        for row in rows["rows"]:
            self.assertEqual(row["comparable"], row["batch"] == 0)
            self.assertEqual(row["allowed"] is None, row["batch"] == 1)
        done = self.verify("--rows", "160")
        self.assertEqual(done.returncode, 0)
        self.assertIn("verified: 80 rows", done.stdout)
        self.assertIn("not comparable: 80 rows with infinite bound", done.stdout)
        self.assertIn("worst at batch 0", done.stdout)

    def test_all_of_them_verify_nothing(self):
        self.save()
        certificate = self.overflow_values(slice(None))
        self.assertTrue(certificate["ok"])
        self.assertEqual(certificate["rows"]["compared"], 0)
        done = self.verify("--lse", self.path("lse.npy"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("NOT COMPARABLE", done.stdout)
        self.assertIn("all 32 sampled rows", done.stdout)

    def test_nan_in_them_never_passes(self):
        self.save()
        self.overflow_values(1)
        self.damage("o.npy", (1, 3, 1, 5), np.nan)
        done = self.verify("--rows", "160")
        self.assertEqual(done.returncode, 1)
        self.assertIn("batch 1, token 3, head 1: NaN", done.stdout)
        self.assertIn("not comparable: 80 rows", done.stdout)

    def test_scores_that_overflow_to_nan_fail_the_certificate(self):
        self.save(scale=1e20)
        self.assertTrue(np.isnan(np.load(self.path("o.npy"))).any())
        self.refuse("run", *self.inputs(), "--output", self.path("p.npy"), "--quiet", status=1,
                    names=["certificate", "NaN where fp32 overflows", "not comparable: 8 rows"])
        self.assertFalse(self.path("p.npy").exists())


if __name__ == "__main__":
    unittest.main()
