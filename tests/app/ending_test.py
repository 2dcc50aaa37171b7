"""However a run ends, and whatever lies in its way, nothing unfinished and nothing of others is touched."""

import fcntl
import signal
import subprocess
import time
import unittest

import numpy as np

from cli import PROGRAM, CliTest


class Signals(CliTest):

    def start(self, *options, **keywords):
        """Starts a run that takes long and waits until all of its outputs are begun."""
        self.save_inputs(shape=(1, 30000, 1, 64))
        command = [PROGRAM, "run", *self.inputs(), "--output", self.path("o.npy"), "--lse", self.path("lse.npy"),
                   "--report", self.path("r.json"), "--trace", self.path("t.json"), "--quiet", "--threads", "1"]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, **keywords)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        output, trace = self.path("o.npy.partial"), self.path("t.json.partial")
        while process.poll() is None and not (trace.exists() and output.stat().st_size > 0):
            time.sleep(0.001)
        self.assertIsNone(process.poll())
        return process

    def left(self):
        # Open MPI's own lock files are not ours to remove.
        return sorted(path.name for path in self.folder.iterdir() if path.suffix != ".lock")

    def test_no_partial_file_outlives_a_signal(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1,
                       signal.SIGUSR2, signal.SIGXCPU):
            process = self.start()
            process.send_signal(number)
            process.wait(60)
            self.assertEqual(process.returncode, -number)
            self.assertEqual(self.left(), ["k.npy", "q.npy", "v.npy"])

    def test_a_signal_that_was_ignored_stays_ignored(self):
        process = self.start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        self.assertIsNone(process.poll())
        self.assertIn("o.npy.partial", self.left())
        process.terminate()
        process.wait(60)
        self.assertEqual(process.returncode, -signal.SIGTERM)


class TextFiles(CliTest):
    """Reports, traces and drawings are written as carefully as tensors."""

    def writers(self):
        """Command lines that write x.json or x.svg, by that name."""
        run = ["run", *self.inputs(), "--output", self.path("o.npy"), "--overwrite", "--quiet"]
        return {"x.json": [run + ["--report", self.path("x.json")], run + ["--trace", self.path("x.json")]],
                "x.svg": [["plan", *self.inputs(), "--svg", self.path("x.svg"), "--overwrite"]]}

    def test_links_are_not_followed(self):
        self.save_inputs()
        self.path("precious").write_text("keep")
        for name, commands in self.writers().items():
            self.path(name + ".partial").symlink_to(self.path("precious"))
            for command in commands:
                self.refuse(*command, names=[name, "symbolic link"])
        self.assertEqual(self.path("precious").read_text(), "keep")
        self.assertFalse(self.path("o.npy").exists())

    def test_what_another_run_writes_is_left_alone(self):
        self.save_inputs()
        for name, commands in self.writers().items():
            with open(self.path(name + ".partial"), "w") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                other.write("unfinished")
                other.flush()
                for command in commands:
                    self.refuse(*command, names=[name, "another run"])
                self.assertEqual(self.path(name + ".partial").read_text(), "unfinished")
            # Its lock is gone: what a killed run left is taken over.
            for command in commands:
                self.succeed(*command)
            self.assertFalse(self.path(name + ".partial").exists())
            self.assertNotIn("unfinished", self.path(name).read_text())

    def test_a_link_at_the_name_itself_is_replaced(self):
        self.save_inputs()
        self.path("precious").write_text("keep")
        self.path("x.json").symlink_to(self.path("precious"))
        self.succeed(*self.writers()["x.json"][0])
        self.assertFalse(self.path("x.json").is_symlink())
        self.assertEqual(self.path("precious").read_text(), "keep")

    def test_a_report_larger_than_the_buffer(self):
        self.save_inputs(shape=(1, 4096, 1, 4))
        self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--quiet", "--chunks", "133",
                     "--trace", self.path("t.json"))
        text = self.path("t.json").read_text()
        self.assertGreater(len(text), 1 << 17)
        self.assertTrue(text.startswith("[") and text.endswith("]\n"))
        np.testing.assert_equal(text.count('"name":"compute"'), 133)


if __name__ == "__main__":
    unittest.main()
