"""Runs on several ranks: the bytes of one, whatever happens to the ranks."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
import unittest

import numpy as np

from cli import PROGRAM, CliTest

SEED = int(os.environ.get("STREAM_CQSA_KILL_SEED", "1"))
KILLS = int(os.environ.get("STREAM_CQSA_KILLS", "4"))
MPIRUN = shutil.which("mpirun")


class Ranks(CliTest):

    shape = (1, 6000, 2, 64)
    options = ["--chunks", "13", "--causal", "--threads", "1"]
    launch_options = []

    def setUp(self):
        super().setUp()
        self.random_moment = random.Random(SEED)

    def command(self, *extra, output="o.npy"):
        return ["run", *self.inputs(), *self.options, "--output", self.path(output),
                "--lse", self.path("lse-" + output), "--quiet", *extra]

    def start(self, ranks, *parts, folders=()):
        """mpirun with one part for all ranks, or a list of (ranks, arguments); parts in folders of
        their own where these are given."""
        environment = {key: value for key, value in os.environ.items()
                       if key != "OMPI_MCA_ess_singleton_isolated"}
        command = [MPIRUN, "--bind-to", "none", *self.launch_options]
        for index, part in enumerate(parts):
            count = ranks if len(parts) == 1 else ranks[index]
            folder = ["-wdir", folders[index]] if folders else []
            command += [":"] * (index > 0) + ["-n", count, *folder, PROGRAM, *part]
        process = subprocess.Popen([str(word) for word in command], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        return process

    def mpirun(self, ranks, *parts, status=0, folders=()):
        process = self.start(ranks, *parts, folders=folders)
        output, error = process.communicate(timeout=250)
        self.assertEqual(process.returncode, status, output + error)
        return error

    def bytes_of(self, output):
        return self.path(output).read_bytes(), self.path("lse-" + output).read_bytes()

    def alone(self, *extra):
        self.succeed(*self.command(*extra, output="expected.npy"))
        return self.bytes_of("expected.npy")

    def rank_processes(self, launcher):
        """{rank: process} of the program's processes that the launcher started."""
        found = {}
        for entry in os.listdir("/proc"):
            folder = pathlib.Path("/proc") / entry
            try:
                if f"PPid:\t{launcher.pid}\n" not in (folder / "status").read_text():
                    continue
                words = (folder / "environ").read_text().split("\0")
            except OSError:
                continue
            for word in words:
                if word.startswith("OMPI_COMM_WORLD_RANK="):
                    found[int(word.split("=")[1])] = int(entry)
        return found


class SameBytes(Ranks):

    def test_bytes_do_not_depend_on_the_number_of_ranks(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        for ranks in (2, 3, 5, 9):
            with self.subTest(ranks=ranks):
                report = self.path(f"r{ranks}.json")
                self.mpirun(ranks, self.command("--overwrite", "--report", report))
                self.assertEqual(self.bytes_of("o.npy"), expected)
                report = json.loads(report.read_text())
                self.assertTrue(report["certificate"]["ok"])
                self.assertEqual(report["ranks"], ranks)
                self.assertEqual([worker["rank"] for worker in report["workers"]],
                                 list(range(1, ranks)))
                work = [worker["subproblems"] for worker in report["workers"]]
                self.assertGreaterEqual(sum(work), 13)
                self.assertLessEqual(report["memory"]["host"]["allocated"],
                                     report["memory"]["host"]["budget"])

    def test_a_pinned_plan(self):
        self.save_inputs(shape=(2, 900, 4, 32), kv_shape=(2, 700, 2, 32), dtype=np.float32)
        self.options = []
        plan = self.path("plan.json")
        done = self.succeed("plan", *self.inputs(), "--lse", self.path("lse-o.npy"),
                            "--device-memory", "3MiB", "--host-memory", "16MiB", "--json")
        plan.write_text(done.stdout)
        expected = self.alone("--plan", plan)
        for ranks in (2, 4):
            self.mpirun(ranks, self.command("--overwrite", "--plan", plan))
            self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_workers_of_different_means(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        common = self.command()
        self.mpirun((2, 1, 1), common, [*common, "--device-memory", "3MiB"],
                    [*common, "--host-memory", "20MiB", "--device-memory", "40MiB"])
        self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_little_host_memory_and_a_scratch_directory(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        self.mpirun(3, self.command("--host-memory", "2MiB", "--scratch", self.folder))
        self.assertEqual(self.bytes_of("o.npy"), expected)


class Predicted(Ranks):

    def test_workers_of_different_speed(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        self.save_costs(flop_per_second=3e9)
        self.save_costs(flop_per_second=1e9, threads=2)
        self.options = ["--chunks", "13", "--causal"]
        report = self.path("r.json")
        common = self.command("--report", report)
        self.mpirun((2, 1), [*common, "--threads", "1"], [*common, "--threads", "2"])
        predicted = json.loads(report.read_text())["predicted"]
        ideal = 4 * 64 * 2 * 6000 * 6001 / 2 / 4e9  # by both together
        self.assertEqual((predicted["bottleneck"], predicted["rates"]), ("compute", "measured"))
        self.assertGreater(predicted["seconds"], ideal)
        self.assertLess(predicted["seconds"], 1.15 * ideal)


class Wrong(Ranks):

    def only_line(self, error):
        lines = [line for line in error.splitlines() if line.startswith("stream-cqsa:")]
        self.assertEqual(len(lines), 1, error)
        return lines[0]

    def test_errors_are_said_once(self):
        self.save_inputs(shape=(1, 50, 2, 16))
        error = self.mpirun(3, self.command("--heads-per-group", "3"), status=2)
        self.only_line(error)
        error = self.mpirun(3, self.command("--scratch", self.path("none")), status=2)
        self.assertIn("--scratch", self.only_line(error))
        self.path("o.npy").write_bytes(b"mine")
        error = self.mpirun(3, self.command(), status=2)
        self.assertIn("--overwrite", self.only_line(error))
        self.assertEqual(self.path("o.npy").read_bytes(), b"mine")
        error = self.mpirun(3, ["plan", *self.inputs()], status=2)
        self.assertIn("--workers", self.only_line(error))

    def test_what_is_wrong_with_one_rank_ends_all(self):
        self.save_inputs(shape=(1, 50, 2, 16))
        good = self.command()
        unknown = [*good, "--devicememory", "3MiB"]
        for parts, words in (((good, unknown), ["rank 1", "--devicememory"]),
                             ((unknown, good), ["--devicememory"]),
                             ((unknown, unknown), ["--devicememory"]),
                             ((good, good[:-5]), ["rank 1", "--output"]),
                             ((good, ["plan", *self.inputs()]), ["run"]),
                             ((good, ["run", "--help"]), ["run"]),
                             ((["--version"], good), ["run"])):
            line = self.only_line(self.mpirun((1, 1), *parts, status=2))
            for word in words:
                self.assertIn(word, line)
        self.assertFalse(self.path("o.npy").exists())

    def test_an_input_that_a_worker_does_not_see_is_named_with_the_rank(self):
        self.save_inputs(shape=(1, 50, 2, 16))
        common = self.command()
        error = self.mpirun((2, 1), common, [*common[:2], self.path("other.npy"), *common[3:]],
                            status=2)
        line = self.only_line(error)
        self.assertIn("rank 2", line)
        self.assertIn("other.npy", line)

    def test_a_worker_with_too_little_memory_is_done_without(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        common = self.command()
        error = self.mpirun((2, 1), common, [*common, "--host-memory", "100KiB"])
        self.assertIn("rank 2 gave up", error)
        self.assertEqual(self.bytes_of("o.npy"), expected)


class Disturbed(Ranks):
    """Kills and signals at random moments; the same command again comes to the same bytes."""

    shape = (1, 20000, 2, 64)
    options = ["--chunks", "31", "--causal", "--threads", "1", "--heads-per-group", "1"]

    def durable(self, *extra):
        return self.command("--checkpoint", self.path("ckpt"), "--checkpoint-interval", "0.05",
                            *extra)

    def forget_outputs(self):
        self.path("o.npy").unlink()
        self.path("lse-o.npy").unlink()

    def finish(self, ranks, expected, *extra):
        ended = self.path("o.npy").exists() and not (self.path("ckpt") / "checkpoint.json").exists()
        if not ended:
            self.mpirun(ranks, self.durable(*extra))
        self.assertEqual(self.bytes_of("o.npy"), expected)
        self.assertFalse(list(self.folder.glob("*.partial")))

    def test_kills_of_a_worker_the_master_and_the_whole_job(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        begin = time.monotonic()
        self.mpirun(3, self.command())
        seconds = time.monotonic() - begin
        self.forget_outputs()
        hits = 0
        for kill in range(KILLS):
            before = self.progress()
            process = self.start(3, self.durable())
            if kill % 2:
                self.wait_for_progress(process, before)
            hits += self.kill_at_random(process, [[1 + kill % 2], [0], []][kill % 3], seconds, before)
            if self.path("o.npy").exists():
                self.finish(3, expected)
                self.forget_outputs()
        self.finish(2 + KILLS % 3, expected)
        self.assertGreaterEqual(hits, KILLS // 4, "too few kills hit a run at work")

    def kill_at_random(self, launcher, victims, seconds, before):
        """SIGKILL for some ranks, or for all and the launcher. Tells whether that ended a run at
        work: one that had progress since `before`, and has no output."""
        if self.progress() == before:
            time.sleep(self.random_moment.uniform(0.1, 1.1) * seconds)
        else:
            time.sleep(self.random_moment.uniform(0, 0.3) * seconds)
        ranks = self.rank_processes(launcher)
        at_work = launcher.poll() is None and self.progress() != before
        pids = [ranks.get(rank) for rank in victims] or [launcher.pid, *ranks.values()]
        for pid in pids:
            try:
                if pid:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        launcher.communicate(timeout=100)
        # What mpirun leaves alone when it is killed itself ends by itself; nobody waits for it.
        while any(os.path.exists(f"/proc/{pid}") for pid in ranks.values()):
            time.sleep(0.01)
        return at_work and not self.path("o.npy").exists()

    def test_kills_where_several_ranks_merge(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        begin = time.monotonic()
        self.mpirun(5, self.command("--mergers", "2"))
        seconds = time.monotonic() - begin
        self.forget_outputs()
        hits = 0
        for kill in range(KILLS // 2):
            before = self.progress()
            process = self.start(5, self.durable("--mergers", "2"))
            if kill % 2:
                self.wait_for_progress(process, before)
            hits += self.kill_at_random(process, [[0], [1], [2], [3], [1, 2], []][kill % 6], seconds,
                                        before)
            if self.path("o.npy").exists():
                self.finish(5, expected, "--mergers", "2")
                self.forget_outputs()
        self.finish(4 + KILLS % 3, expected, "--mergers", "2")
        self.assertFalse(list(self.path("ckpt").iterdir()))
        self.assertGreaterEqual(hits, KILLS // 8, "too few kills hit a run at work")

    def test_stopped_and_continued_where_several_ranks_merge(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        parts = [self.path("ckpt") / part for part in ("journal", "merger-1/journal",
                                                       "merger-2/journal")]

        def progress():
            return [path.stat().st_size if path.exists() else 0 for path in parts]

        process = self.start(4, self.durable("--mergers", "2"))
        while process.poll() is None and min(progress()) <= 32:
            time.sleep(0.005)
        self.assertIsNone(process.poll(), "the run ended before its first checkpoints")
        ranks = self.rank_processes(process)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for pid in ranks.values():
                os.kill(pid, number)
            time.sleep(0.1)
        _, error = process.communicate(timeout=100)
        self.assertEqual(process.returncode, 75, error)
        self.assertIn("the same command continues", error)
        self.assertGreater(int(error.split(" of the scores are merged")[0].split()[-1][:-1]), 0)
        for mergers in ("1", "3"):
            error = self.mpirun(5, self.durable("--mergers", mergers), status=2)
            self.assertIn("--mergers was 2", error)
        states = self.path("ckpt") / "merger-1" / "states"
        raw = bytearray(states.read_bytes())
        for place in range(1000, len(raw), max(1, len(raw) // 40)):
            raw[place] ^= 1
        states.write_bytes(raw)
        report = self.path("r.json")
        error = self.mpirun(5, self.durable("--mergers", "2", "--report", report))
        self.assertIn("is damaged", error)
        report = json.loads(report.read_text())
        self.assertGreater(report["checkpoint"]["recomputed_pieces"], 0)
        self.assertGreater(report["checkpoint"]["resumed_from"], 0)
        self.assertTrue(report["certificate"]["ok"])
        self.assertEqual(self.bytes_of("o.npy"), expected)

    def test_stopped_and_continued_on_other_ranks(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        journal = self.path("ckpt") / "journal"

        def durable():
            return (journal.stat().st_mtime_ns, journal.stat().st_size) if journal.exists() else (0, 0)

        for number in (signal.SIGTERM, signal.SIGINT):
            before = durable()
            process = self.start(3, self.durable())
            while process.poll() is None and (durable() == before or durable()[1] <= 32):
                time.sleep(0.005)
            self.assertIsNone(process.poll(), "the run ended before its first checkpoint")
            master = self.rank_processes(process)[0]
            os.kill(master, number)
            _, error = process.communicate(timeout=100)
            self.assertEqual(process.returncode, 75, error)
            self.assertIn("the same command continues", error)
        self.finish(5, expected)

    def start_at_work(self, ranks):
        """A run that has a checkpoint."""
        journal = self.path("ckpt") / "journal"
        process = self.start(ranks, self.durable())
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 32):
            time.sleep(0.005)
        self.assertIsNone(process.poll(), "the run ended before its first checkpoint")
        return process

    def test_a_worker_that_does_not_answer_holds_no_stop_up(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        process = self.start_at_work(3)
        ranks = self.rank_processes(process)
        os.kill(ranks[2], signal.SIGSTOP)
        os.kill(ranks[0], signal.SIGTERM)
        _, error = process.communicate(timeout=100)
        self.assertEqual(process.returncode, 75, error)
        lines = [line for line in error.splitlines() if line.startswith("stream-cqsa:")]
        self.assertEqual(len(lines), 1, error)
        self.assertIn("the same command continues", lines[0])
        self.finish(3, expected)

    def test_signals_to_all_ranks_and_damage(self):
        self.save_inputs(shape=self.shape, dtype=np.float16)
        expected = self.alone()
        process = self.start_at_work(3)
        ranks = self.rank_processes(process)
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            for pid in ranks.values():
                os.kill(pid, number)
            time.sleep(0.1)
        _, error = process.communicate(timeout=100)
        self.assertEqual(process.returncode, 75, error)
        states = self.path("ckpt") / "states"
        raw = bytearray(states.read_bytes())
        for place in range(1000, len(raw), len(raw) // 40):
            raw[place] ^= 1
        states.write_bytes(raw)
        report = self.path("r.json")
        error = self.mpirun(3, self.durable("--report", report))
        self.assertIn("is damaged", error)
        checkpoint = json.loads(report.read_text())["checkpoint"]
        self.assertGreater(checkpoint["recomputed_pieces"], 0)
        self.assertEqual(self.bytes_of("o.npy"), expected)


if __name__ == "__main__":
    unittest.main()
