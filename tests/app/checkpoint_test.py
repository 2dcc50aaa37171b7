"""A run with a checkpoint survives whatever ends it, and comes to the same bytes."""

import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import time
import unittest

import numpy as np

from cli import PROGRAM, CliTest

SEED = int(os.environ.get("STREAM_CQSA_KILL_SEED", "1"))


def checksum(data):
    """That of src/engine/checksum.cpp, with seed 0."""
    mask, primes = (1 << 64) - 1, (0x9e3779b185ebca87, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9)

    def mix(total, word):
        total = (total + word * primes[1]) & mask
        return ((total << 31 | total >> 33) & mask) * primes[0] & mask

    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i:i + 8], "little") for i in range(0, len(padded), 8)]
    lanes, whole = [0, primes[0], primes[1], mask], len(data) // 32 * 4
    for i in range(whole):
        lanes[i % 4] = mix(lanes[i % 4], words[i])
    total = mix(0, len(data))
    for word in lanes + words[whole:]:
        total = mix(total, word)
    total = (total ^ total >> 33) * primes[1] & mask
    total = (total ^ total >> 29) * primes[2] & mask
    return total ^ total >> 32


class Checkpoint(CliTest):
    """Runs of about a second, in many subproblems, beside one that nothing disturbs."""

    shape = (1, 12000, 2, 64)
    options = ["--chunks", "31", "--causal", "--threads", "1", "--heads-per-group", "1"]

    def setUp(self):
        super().setUp()
        self.save_inputs(shape=self.shape, dtype=np.float16)
        self.random_moment = random.Random(SEED)

    def command(self, *extra, output="o.npy", checkpoint="ckpt", interval="0.05"):
        command = ["run", *self.inputs(), *self.options, "--output", self.path(output),
                   "--lse", self.path("lse-" + output), "--quiet", *extra]
        if checkpoint:
            command += ["--checkpoint", self.path(checkpoint), "--checkpoint-interval", interval]
        return [str(word) for word in command]

    def undisturbed(self, *extra):
        """The bytes of O and lse, and the seconds that they took."""
        begin = time.monotonic()
        self.succeed(*self.command(*extra, output="expected.npy", checkpoint=None))
        return self.bytes_of("expected.npy"), time.monotonic() - begin

    def bytes_of(self, output):
        return self.path(output).read_bytes(), self.path("lse-" + output).read_bytes()

    def start(self, *extra, **keywords):
        process = subprocess.Popen([PROGRAM, *self.command(*extra, **keywords)], stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        return process

    def journal_size(self):
        journal = self.path("ckpt") / "journal"
        return journal.stat().st_size if journal.exists() else 0

    def wait_until_durable(self, process):
        while process.poll() is None and self.journal_size() <= 32:
            time.sleep(0.002)
        self.assertIsNone(process.poll(), "the run ended before its first checkpoint")

    def stopped_run(self, *extra):
        """Leaves a checkpoint in the middle of a run."""
        return self.stop(self.start(*extra))

    def stop(self, process):
        self.wait_until_durable(process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 75, error)
        return error

    def finish(self, *extra):
        return self.succeed(*self.command(*extra, "--report", self.path("r.json")))

    def report(self):
        return json.loads(self.path("r.json").read_text())

    def check_finished(self, expected, report=True):
        self.assertEqual(self.bytes_of("o.npy"), expected)
        # A kill may have come between these.
        left = set() if report else {"publishing", "lock"}
        self.assertLessEqual({path.name for path in self.path("ckpt").iterdir()}, left)
        self.assertFalse(list(self.folder.glob("*.partial")))
        if not report:
            return
        certificate = self.report()["certificate"]
        self.assertTrue(certificate["ok"])
        self.assertEqual(certificate["scores_merged"], certificate["scores_kept_by_mask"])
        self.assertEqual(certificate["output"]["vectors"], certificate["output"]["of_vectors"])


class Kills(Checkpoint):

    def survive(self, kills, *extra):
        if "STREAM_CQSA_KILLS" not in os.environ:
            kills //= 2
        expected, seconds = self.undisturbed(*extra)
        hits = 0
        for kill in range(kills):
            before = self.progress()
            process = self.start(*extra)
            latest = 1.2 * seconds
            if kill % 2:
                self.wait_for_progress(process, before)
                latest = 0.3 * seconds
            try:
                process.wait(self.random_moment.uniform(0, latest))
            except subprocess.TimeoutExpired:
                at_work = self.progress() != before
                process.kill()
            else:
                at_work = False
            _, error = process.communicate()
            self.assertIn(process.returncode, (0, -signal.SIGKILL), error)
            hits += at_work and process.returncode != 0
            self.assertNotIn("damaged", error)
            complete = self.path("o.npy").exists() and not (self.path("ckpt") / "checkpoint.json").exists()
            self.assertTrue(complete or process.returncode != 0)
            if complete:  # sooner than the kill: once more
                self.check_finished(expected, report=False)
                for name in ("o.npy", "lse-o.npy"):
                    self.path(name).unlink()
        done = self.finish(*extra)
        self.assertNotIn("damaged", done.stderr)
        self.check_finished(expected, report="had ended" not in done.stderr)
        self.assertGreaterEqual(hits, kills // 5, "too few kills hit a run at work")

    def test_killed_at_random_moments(self):
        self.survive(10)

    def test_killed_with_accumulators_in_the_file(self):
        self.survive(8, "--host-memory", "3MiB", "--scratch", self.folder)

    def test_killed_with_rows_without_keys(self):
        self.save_inputs(shape=self.shape, kv_shape=(1, 7000, 2, 64), dtype=np.float16)
        self.survive(8)


def wait_for_handlers(process):
    """Until SIGUSR1 does not end the process any more."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)
        if int(caught[1], 16) >> signal.SIGUSR1 - 1 & 1:
            return


class Signals(Checkpoint):

    def test_a_signal_stops_soon_and_the_same_command_continues(self):
        expected, _ = self.undisturbed()
        for number, interval in ((signal.SIGTERM, "3600"), (signal.SIGINT, "0.05"),
                                 (signal.SIGHUP, "3600")):
            size = self.journal_size()
            process = self.start(interval=interval)
            wait_for_handlers(process)
            while not (self.path("ckpt") / "states").exists():
                time.sleep(0.002)
            while process.poll() is None and self.journal_size() <= max(size, 32):
                if interval == "3600":
                    process.send_signal(signal.SIGUSR1)
                time.sleep(0.01)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 75, error)
            self.assertIn("% of the scores are merged; the same command continues", error)
            self.assertIn(str(self.path("ckpt")), error)
            self.assertTrue(self.path("o.npy.partial").exists())
            self.assertFalse(self.path("o.npy").exists())
        self.finish()
        self.check_finished(expected)
        self.assertGreater(self.report()["checkpoint"]["resumed_from"], 0)

    def test_a_long_subproblem_does_not_delay_the_end(self):
        self.save_inputs(shape=(1, 120000, 1, 64), dtype=np.float16)
        process = subprocess.Popen([PROGRAM, *map(str, [
            "run", *self.inputs(), "--chunks", "1", "--threads", "1", "--output", self.path("o.npy"), "--quiet",
            "--checkpoint", self.path("ckpt")])], stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        while not (self.path("ckpt") / "states").exists():
            time.sleep(0.01)
        time.sleep(1)
        self.assertIsNone(process.poll())
        process.terminate()
        process.communicate(timeout=20)  # the subproblem takes far longer
        self.assertEqual(process.returncode, 75)

    def test_it_stops_before_its_time_is_over(self):
        expected, _ = self.undisturbed()
        self.refuse(*self.command(), "--max-hours", "1e-6", status=75, names=["the same command continues"])
        self.succeed(*self.command(), "--max-hours", "24")
        self.check_finished(expected, report=False)

    def test_without_a_checkpoint_a_signal_ends_the_run(self):
        process = self.start(checkpoint=None)
        partial = self.path("o.npy.partial")
        # It gets its size when the run knows that the file is its own to remove.
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > 0):
            time.sleep(0.002)
        process.terminate()
        process.wait(60)
        self.assertEqual(process.returncode, -signal.SIGTERM)
        self.assertFalse(self.path("o.npy.partial").exists())


class Refusals(Checkpoint):

    def test_of_two_runs_at_once_the_second_is_refused(self):
        expected, _ = self.undisturbed()
        process = self.start()
        self.wait_until_durable(process)
        os.kill(process.pid, signal.SIGSTOP)
        self.refuse(*self.command(output="other.npy"), names=["another run", "ckpt"])
        os.kill(process.pid, signal.SIGCONT)
        process.wait(120)
        self.assertEqual(process.returncode, 0)
        self.check_finished(expected, report=False)

    def test_another_run_is_refused_and_named(self):
        expected, _ = self.undisturbed()
        self.stopped_run()
        same = self.command()
        without_causal = [word for word in same if word != "--causal"]
        self.refuse(*without_causal, names=["--causal"])
        self.refuse(*same, "--scale", "0.3", names=["--scale"])
        self.refuse(*same, "--output-dtype", "f32", names=["--output-dtype"])
        self.refuse(*self.command(output="other.npy"), names=["--output"])
        chunks = list(same)
        chunks[chunks.index("--chunks") + 1] = "13"
        self.refuse(*chunks, names=["--chunks"])
        self.refuse(*same, "--host-memory", "123MiB", names=["--host-memory"])
        self.refuse(*same, "--device-memory", "123MiB", names=["--device-memory"])
        self.finish()
        self.check_finished(expected)

    def test_other_inputs_are_refused_and_named(self):
        self.stopped_run()
        status = self.path("k.npy").stat()
        keys = np.load(self.path("k.npy"))
        keys[0, 0, 0, 0] += 1
        np.save(self.path("k.npy"), keys)
        os.utime(self.path("k.npy"), ns=(status.st_atime_ns, status.st_mtime_ns))
        self.refuse(*self.command(), names=["key", "sample"])
        keys[0, 0, 0, 0] -= 1
        np.save(self.path("k.npy"), keys)
        self.refuse(*self.command(), names=["key", "modified"])

    def test_another_version_is_refused_and_named(self):
        self.stopped_run()
        path = self.path("ckpt") / "checkpoint.json"
        stored = json.loads(path.read_text())
        for name in ("version", "commit", "arithmetic", "plan"):
            other = dict(stored["identity"], **{name: "another"})
            text = json.dumps(other, separators=(",", ":"), ensure_ascii=False)
            path.write_text(json.dumps({"identity": other, "checksum": f"{checksum(text.encode()):016x}"}))
            self.refuse(*self.command(), names=[f"{name} was"])

    def test_wrong_usage(self):
        self.refuse(*self.command(checkpoint=None), "--max-hours", "1", names=["--checkpoint"])
        self.refuse(*self.command(), "--max-hours", "0", names=["--max-hours"])
        self.refuse(*self.command(interval="-1"), names=["--checkpoint-interval"])
        self.path("ckpt").mkdir(exist_ok=True)
        (self.path("ckpt") / "thesis.tex").write_text("mine")
        self.refuse(*self.command(), names=["thesis.tex"])
        self.assertEqual((self.path("ckpt") / "thesis.tex").read_text(), "mine")


class Damage(Checkpoint):

    def continue_after(self, change, *words):
        """What is damaged is computed again, and said."""
        for name in ("o.npy", "lse-o.npy"):
            self.path(name).unlink(missing_ok=True)
        self.stopped_run()
        change()
        done = self.finish("--overwrite")
        self.check_finished(self.expected)
        for word in words:
            self.assertIn(word, done.stderr)

    def flip(self, path, offset):
        data = bytearray(path.read_bytes())
        data[offset] ^= 4
        path.write_bytes(data)

    def test_damaged_and_missing_files(self):
        self.expected, _ = self.undisturbed()
        ckpt = self.path("ckpt")
        self.continue_after(lambda: self.flip(ckpt / "journal", 5), "damaged")
        self.continue_after(lambda: self.flip(ckpt / "journal", 40), "dropped")
        self.continue_after(lambda: self.flip(ckpt / "checkpoint.json", 40))
        self.continue_after(lambda: self.flip(ckpt / "plan.json", 40))
        self.continue_after(lambda: (ckpt / "states").unlink(), "damaged")
        self.continue_after(lambda: (ckpt / "journal").unlink())
        self.continue_after(lambda: (ckpt / "checkpoint.json").unlink())
        self.continue_after(lambda: os.truncate(ckpt / "journal", (ckpt / "journal").stat().st_size - 3), "1 journal")
        self.continue_after(lambda: self.path("o.npy.partial").unlink())
        self.continue_after(lambda: os.truncate(self.path("o.npy.partial"), 1000))

    def test_a_full_disk_ends_resumably(self):
        """The size limit of files stands for a disk: the states outgrow it."""
        expected, _ = self.undisturbed()
        self.stopped_run()
        limit = self.path("o.npy.partial").stat().st_size
        line = self.refuse(*self.command(), status=75, names=["same command continues"],
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.assertIn(str(self.path("ckpt")), line)
        self.finish()
        self.check_finished(expected)


class Starting(Checkpoint):

    def test_requests_for_checkpoints_while_it_starts(self):
        expected, _ = self.undisturbed()
        process = self.start()
        wait_for_handlers(process)
        while process.poll() is None and self.journal_size() <= 32:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.001)
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, error)
        self.assertEqual(self.bytes_of("o.npy"), expected)


class Publishing(Checkpoint):

    def killed_while_giving_names(self):
        """A finished run again as it was when it had begun to give its outputs their names."""
        self.stopped_run()
        identity = (self.path("ckpt") / "checkpoint.json").read_bytes()
        self.finish()
        for name in ("o.npy", "lse-o.npy"):
            os.rename(self.path(name), self.path(name + ".partial"))
        (self.path("ckpt") / "checkpoint.json").write_bytes(identity)
        os.rename(self.path("lse-o.npy.partial"), self.path("lse-o.npy"))
        (self.path("ckpt") / "publishing").write_text("")

    def test_a_run_that_was_killed_while_it_gave_names(self):
        expected, _ = self.undisturbed()
        self.killed_while_giving_names()
        done = self.succeed(*self.command())
        self.assertIn("had ended", done.stderr)
        self.check_finished(expected, report=False)

    def test_the_names_are_not_given_by_another_command(self):
        expected, _ = self.undisturbed()
        self.killed_while_giving_names()
        self.refuse(*self.command("--scale", "0.5"), names=["--scale", "belongs to another run"])
        self.refuse(*self.command("--heads-per-group", "2"), names=["--heads-per-group"])
        self.assertFalse(self.path("o.npy").exists())
        self.succeed(*self.command())
        self.check_finished(expected, report=False)

    def test_outputs_that_are_gone_are_computed_again(self):
        expected, _ = self.undisturbed()
        self.killed_while_giving_names()
        for name in ("o.npy.partial", "lse-o.npy"):
            self.path(name).unlink()
        self.stopped_run()
        self.assertFalse((self.path("ckpt") / "publishing").exists())
        self.finish("--overwrite")
        self.check_finished(expected)

    def test_names_may_be_any_bytes(self):
        expected, _ = self.undisturbed()
        name = os.fsdecode(b"o\xff.npy")
        self.stop(self.start(output=name))
        self.succeed(*self.command("--report", self.path("r.json"), output=name))
        self.assertEqual(self.bytes_of(name), expected)
        self.assertIn("o\ufffd.npy", self.path("r.json").read_text(encoding="utf-8"))

    def test_a_mark_of_a_run_that_nobody_knows_publishes_nothing(self):
        expected, _ = self.undisturbed()
        self.path("ckpt").mkdir(exist_ok=True)
        (self.path("ckpt") / "publishing").write_text("")
        self.path("o.npy.partial").write_text("something else")
        self.finish()
        self.check_finished(expected)


if __name__ == "__main__":
    unittest.main()
