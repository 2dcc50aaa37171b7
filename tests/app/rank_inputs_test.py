"""How the inputs come to several ranks, and what the certificate says of them."""

import json
import os
import signal
import time
import unittest

import numpy as np

import ranks_test


class Certificate(ranks_test.Ranks):
    """That of one rank: checksums of the inputs too, whoever read them, and how often."""

    def certificate(self):
        return json.loads(self.path("r.json").read_text())["certificate"]

    def test_it_does_not_depend_on_ranks(self):
        for layout, dtype in (("bshd", np.float16), ("bhsd", np.float32)):
            shapes = [(2, 900, 4, 24), (2, 1100, 2, 24)]
            if layout == "bhsd":
                shapes = [(b, h, n, d) for b, n, h, d in shapes]
            query, key, value = self.save_inputs(*shapes, dtype=dtype)
            key[1, 1, 1, 3], value[0, 1, 0, 2] = np.nan, -np.inf
            np.save(self.path("k.npy"), key)
            np.save(self.path("v.npy"), value)
            self.options = ["--chunks", "7", "--heads-per-group", "1", "--layout", layout,
                            "--overwrite", "--report", self.path("r.json")]
            self.succeed(*self.command())
            expected = self.certificate()
            self.assertEqual(expected["query"]["vectors"], expected["query"]["of_vectors"])
            self.assertEqual(expected["key"]["nan"], 1)
            self.assertEqual(expected["value"]["infinite"], 1)
            for ranks, extra in ((2, []), (4, []), (4, ["--input-through-master"])):
                with self.subTest(layout=layout, ranks=ranks, extra=extra):
                    self.mpirun(ranks, self.command(*extra))
                    self.assertEqual(self.certificate(), expected)

    def test_parts_that_are_not_read_are_not_counted(self):
        # The first 1000 queries see no key.
        self.save_inputs(shape=(1, 1500, 2, 32), kv_shape=(1, 500, 2, 32))
        self.options = ["--chunks", "7", "--causal", "--overwrite", "--report", self.path("r.json")]
        self.succeed(*self.command())
        expected = self.certificate()
        self.assertLess(expected["query"]["vectors"], expected["query"]["of_vectors"])
        for extra in ([], ["--input-through-master"]):
            self.mpirun(3, self.command(*extra))
            self.assertEqual(self.certificate(), expected)


class ThroughMaster(ranks_test.Ranks):
    """Workers in a folder where the inputs are not."""

    def setUp(self):
        super().setUp()
        self.elsewhere = self.path("elsewhere")
        self.elsewhere.mkdir()

    def inputs(self):
        return ["--query", "q.npy", "--key", "k.npy", "--value", "v.npy"]

    def alone(self, *extra):
        self.succeed(*self.command(*extra, output="expected.npy"), cwd=self.folder)
        return self.bytes_of("expected.npy")

    def through(self, ranks, *extra, **keywords):
        part = self.command("--input-through-master", "--overwrite", *extra)
        return self.mpirun((1, ranks - 1), part, part, folders=(self.folder, self.elsewhere),
                           **keywords)

    def report(self, ranks, *extra):
        self.through(ranks, "--report", self.path("r.json"), *extra)
        return json.loads(self.path("r.json").read_text())

    def test_bytes_are_those_of_one_rank(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        for ranks in (2, 3, 5):
            with self.subTest(ranks=ranks):
                report = self.report(ranks)
                self.assertEqual(self.bytes_of("o.npy"), expected)
                self.assertTrue(report["certificate"]["ok"])
                # What a worker asks for near the end may come too late for an answer.
                served = report["master"]["inputs_served"]["bytes"]
                self.assertGreaterEqual(served, 3 * 6000 * 2 * 64 * 2)
                self.assertLessEqual(served,
                                     sum(worker["bytes_read"] for worker in report["workers"]))

    def test_layouts_types_and_head_groups(self):
        self.options = ["--chunks", "7", "--causal", "--heads-per-group", "1"]
        for layout, dtype in (("bshd", np.float64), ("bhsd", np.float16), ("bhsd", np.float64),
                              ("bshd", np.float32)):
            with self.subTest(layout=layout, dtype=dtype):
                shapes = [(2, 700, 4, 24), (2, 900, 2, 24)]
                if layout == "bhsd":
                    shapes = [(b, h, n, d) for b, n, h, d in shapes]
                self.save_inputs(shape=shapes[0], kv_shape=shapes[1], dtype=dtype)
                expected = self.alone("--layout", layout, "--overwrite")
                self.through(3, "--layout", layout)
                self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_blocks_of_several_messages(self):
        self.save_inputs(shape=(1, 9000, 2, 64), dtype=np.float32)
        self.options = ["--chunks", "1", "--causal"]
        expected = self.alone()
        served = self.report(2)["master"]["inputs_served"]
        self.assertGreater(served["buffer_bytes"], 2 << 20)
        self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_memory_stays_below_the_budget(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        for budget in ("1MiB", "2MiB"):
            host = self.report(4, "--host-memory", budget, "--scratch", self.folder)["memory"]["host"]
            self.assertLessEqual(host["allocated"], host["budget"])
            self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_any_rank_may_ask_for_it(self):
        self.save_inputs(shape=(1, 900, 2, 64), dtype=np.float16)
        expected = self.alone()
        part = self.command()
        self.mpirun((1, 2), part, [*part, "--input-through-master"],
                    folders=(self.folder, self.elsewhere))
        self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_a_synthetic_input(self):
        options = ["run", "--input", "synthetic:3", "--shape", "1,900,2,32", "--chunks", "7",
                   "--quiet", "--output"]
        self.succeed(*options, self.path("expected.npy"))
        self.mpirun(3, [*options, self.path("o.npy"), "--input-through-master"])
        self.assertEqual(self.path("o.npy").read_bytes(), self.path("expected.npy").read_bytes())

    def test_errors_of_the_master_are_said_once(self):
        self.save_inputs(shape=(1, 50, 2, 16))
        for extra in (["--key", "none.npy"], ["--scratch", self.path("none")]):
            part = self.command("--input-through-master", *extra)
            if "--key" in extra:
                del part[part.index("--key"):part.index("--key") + 2]
            error = self.mpirun((1, 2), part, part, folders=(self.folder, self.elsewhere),
                                status=2)
            lines = [line for line in error.splitlines() if line.startswith("stream-cqsa:")]
            self.assertEqual(len(lines), 1, error)

    def test_stopped_and_continued(self):
        self.shape, self.options = ranks_test.Disturbed.shape, ranks_test.Disturbed.options
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        journal = self.path("ckpt") / "journal"
        part = self.command("--input-through-master", "--checkpoint", self.path("ckpt"),
                            "--checkpoint-interval", "0.05")
        process = self.start((1, 2), part, part, folders=(self.folder, self.elsewhere))
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 32):
            time.sleep(0.005)
        os.kill(self.rank_processes(process)[0], signal.SIGTERM)
        _, error = process.communicate(timeout=100)
        self.assertEqual(process.returncode, 75, error)
        self.mpirun((1, 4), part, part, folders=(self.folder, self.elsewhere))
        self.assertEqual(self.bytes_of("o.npy"), expected)


if __name__ == "__main__":
    unittest.main()
