"""Every bad input: one line, exit status 2, nothing written. Failures in mid-run: exit status 1."""

import re
import resource
import shutil
import subprocess
import time
import unittest

import numpy as np

from cli import PROGRAM, CliTest, run_program, write_safetensors


class BadInput(CliTest):

    def tearDown(self):
        left = [path.name for path in self.folder.iterdir() if path.name.startswith("o.")]
        self.assertEqual(left, [])

    def refuse_run(self, *options, **keywords):
        return self.refuse("run", *self.inputs(), "--output", self.path("o.npy"), *options, **keywords)

    def test_shapes_that_disagree(self):
        self.save_inputs(shape=(1, 20, 2, 8))
        for shape, word in [((1, 21, 2, 8), "tokens"), ((1, 20, 1, 8), "heads"), ((2, 20, 2, 8), "batch"),
                            ((1, 20, 2, 4), "elements"), ((20, 2, 8), "dimensions")]:
            np.save(self.path("v.npy"), np.zeros(shape, np.float32))
            self.refuse_run(names=["v.npy", word])

    def test_heads_that_do_not_divide(self):
        self.save_inputs(shape=(1, 20, 3, 8), kv_shape=(1, 20, 2, 8))
        self.refuse_run(names=["3 heads", "2 heads"])

    def test_dtypes_that_disagree_or_are_not_supported(self):
        self.save_inputs()
        np.save(self.path("k.npy"), np.zeros((1, 200, 2, 16), np.float16))
        self.refuse_run(names=["k.npy", "f16"])
        np.save(self.path("k.npy"), np.zeros((1, 200, 2, 16), np.int32))
        self.refuse_run(names=["k.npy"])

    def test_ranks_and_empty_tensors(self):
        for shape in [(20,), (1, 1, 20, 2, 8), (1, 0, 2, 8)]:
            self.save_inputs(shape=shape)
            self.refuse_run(names=["q.npy"])

    def test_npy_orders(self):
        self.save_inputs()
        np.save(self.path("q.npy"), np.asfortranarray(np.zeros((1, 200, 2, 16), np.float32)))
        self.refuse_run(names=["q.npy", "Fortran"])
        np.save(self.path("q.npy"), np.zeros((1, 200, 2, 16), ">f4"))
        self.refuse_run(names=["q.npy", "big-endian"])

    def test_truncated_and_missing_files(self):
        self.save_inputs()
        whole = self.path("q.npy").read_bytes()
        for size in (0, 5, 60, 127, len(whole) - 1):
            self.path("q.npy").write_bytes(whole[:size])
            self.refuse_run(names=["q.npy"])
        self.path("q.npy").unlink()
        self.refuse_run(names=["q.npy"])

    def test_safetensors_headers(self):
        path = self.path("x.safetensors")
        data = {name: np.zeros((4, 8), np.float32) for name in "qkv"}
        entry = '"%s": {"dtype": "F32", "shape": [4, 8], "data_offsets": [%d, %d]}'
        def header(*places):
            return "{" + ", ".join(entry % (n, b, e) for n, (b, e) in zip("qkv", places)) + "}"
        for text in ["not json", "[" * 100000, "{}", header((0, 128), (64, 192), (256, 384)),
                     header((0, 128), (128, 256), (256, 500)), header((128, 0), (128, 256), (256, 384)),
                     header((0, 128), (128, 256), (2**64 - 128, 2**64)),
                     header((0, 128), (128, 256), (256, 384)).replace("[4, 8]", "[4294967296, 4294967297]"),
                     header((0, 128), (128, 256), (256, 384)).replace("F32", "I8")]:
            write_safetensors(path, data, header=text)
            self.refuse("run", "--input", path, "--output", self.path("o.npy"), names=["x.safetensors"])
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
        self.refuse("run", "--input", path, "--output", self.path("o.npy"), names=["x.safetensors"])

    def test_options(self):
        self.save_inputs()
        self.refuse("run", "--output", self.path("o.npy"), names=["no input"])
        self.refuse("run", *self.inputs(), names=["--output"])
        self.refuse("unknown", names=["unknown"])
        self.refuse(names=["command"])
        self.refuse_run("--cuasal", names=["--cuasal"])
        self.refuse_run("stray", names=["stray"])
        for option, value in [("--backend", "tpu"), ("--device-memory", "2GiBB"), ("--host-memory", "-1"),
                              ("--chunks", "20001"), ("--chunks", "0"), ("--chunks", "-3"), ("--chunks", "x"),
                              ("--layout", "hbsd"), ("--direct-io", "maybe"), ("--scale", "nan"), ("--scale", "1e39"), ("--output-dtype", "f8"),
                              ("--scratch", "/nowhere"), ("--plan", "/nowhere.json"),
                              ("--heads-per-group", "9"), ("--heads-per-group", "0"), ("--threads", "-1"),
                              ("--threads", "4097"),
                              ("--plan", self.folder)]:
            self.refuse_run(option, value)
        for command in (["run", "--output", self.path("o.npy")], ["plan"]):
            for option, value, allowed in [("--chunks", "0", "1 to 20000"), ("--heads-per-group", "0", "1 to 2"),
                                           ("--scratch", "/nowhere", "not a directory")]:
                self.refuse(*command, *self.inputs(), option, value, names=[f"{option} {value}", allowed])
        self.refuse("generate", "--shape", "1,2,3,4", "--dtype", "f64", "--query", self.path("o.npy"), "--key",
                    self.path("o.k.npy"), "--value", self.path("o.v.npy"), names=["f64"])
        self.refuse("run", "--input", "synthetic:x", "--shape", "1,2,3,4", "--output", self.path("o.npy"))
        for shape in ("1,2,3", "1,2,3,4,5", "1,2,3,0", "1,2,3,x", "1,2,3,4,", ""):
            self.refuse("run", "--input", "synthetic:1", "--shape", shape, "--output", self.path("o.npy"))

    def test_files_that_cannot_be_generated(self):
        shape = ["--shape", "1,2,3,4"]
        three = lambda suffix: ["--query", self.path("o.q" + suffix), "--key", self.path("o.k" + suffix),
                                "--value", self.path("o.v.safetensors")]
        self.refuse("generate", *shape, names=["--output", "--query, --key and --value"])
        self.refuse("generate", *shape, *three(".npy")[:4], names=["--output", "--query, --key and --value"])
        self.refuse("generate", *shape, *three(".npy"), "--output", self.path("o.safetensors"), names=["excludes"])
        self.refuse("generate", *shape, "--output", self.path("o.npy"), names=["o.npy", "--query, --key and --value"])
        self.refuse("generate", *shape, "--output", self.path("o.bin"), names=["o.bin", ".safetensors"])
        self.refuse("generate", *shape, "--dtype", "bf16", *three(".npy"),
                    names=["o.q.npy", "--dtype f16 or f32"])
        self.path("there.safetensors").write_text("keep")
        self.refuse("generate", *shape, "--output", self.path("there.safetensors"), names=["exists", "--overwrite"])
        self.assertEqual(self.path("there.safetensors").read_text(), "keep")
        # Nothing is written where the last of three files cannot be.
        self.refuse("generate", *shape, *three(".npy")[:4], "--value", self.path("o.v.bin"), names=["o.v.bin"])
        # Nor on a disk that is too small for all three tensors.
        limit = 2 * 2 * 65536
        done = run_program("generate", "--shape", "1,2048,1,32", "--output", self.path("o.safetensors"),
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.assertEqual(done.returncode, 1)
        # Open MPI may say something of its own before.
        line = done.stderr.strip().splitlines()[-1]
        self.assertIn("o.safetensors", line)
        self.assertIn("File too large", line)

    def test_plans_of_something_else_say_what_differs(self):
        self.save_inputs(shape=(1, 200, 2, 16))
        plan = self.path("plan.json")
        plan.write_text(self.succeed("plan", *self.inputs(), "--json").stdout)
        self.refuse_run("--plan", plan, "--causal", names=["plan.json", "mask none", "this run has causal"])
        self.refuse_run("--plan", plan, "--lse", self.path("o.lse.npy"), names=["lse false", "this run has true"])
        self.save_inputs(shape=(1, 200, 2, 8))
        line = self.refuse_run("--plan", plan, names=["plan.json", "for head_dim 16, the input has 8;"])
        self.assertNotIn("query_length", line)
        text = plan.read_text()
        for bad, place in [(text.replace("problem", 'pro"blem', 1), "line 3, column 6"), ("", "line 1, column 1"),
                           (text[:-2], "column")]:
            plan.write_text(bad)
            line = self.refuse_run("--plan", plan, names=["plan.json", "not JSON", place, "plan --json"])
            self.assertNotIn("[json", line)
        plan.write_text(text.replace('"kv_heads"', '"heads"', 1))
        self.refuse_run("--plan", plan, names=["plan.json", "has no 'kv_heads'"])

    def test_budgets_that_are_too_small_name_the_smallest(self):
        self.save_inputs(shape=(1, 3000, 4, 64))
        for option in ("--device-memory", "--host-memory"):
            line = self.refuse_run(option, "1KiB", names=["smallest"])
            self.assertIn("device" if "device" in option else "host", line)

    def test_outputs(self):
        self.save_inputs()
        self.refuse("run", *self.inputs(), "--output", self.path("q.npy"), names=["is an input"])
        self.refuse("run", *self.inputs(), "--output", self.path("q.npy"), "--overwrite", names=["is an input"])
        self.path("there.npy").write_text("keep")
        self.refuse("run", *self.inputs(), "--output", self.path("there.npy"), names=["exists", "--overwrite"])
        self.assertEqual(self.path("there.npy").read_text(), "keep")
        self.refuse("run", *self.inputs(), "--output", self.path("o.txt"), names=["o.txt"])
        self.refuse("run", *self.inputs(), "--output", self.path("none") / "o.npy", names=["directory"])
        self.refuse_run("--lse", self.path("o.npy"), names=["two outputs"])
        for option in ("--report", "--trace"):
            self.refuse_run(option, self.path("q.npy"), names=["is an input"])
            self.refuse_run(option, self.path("there.npy"), names=["exists"])
            self.refuse_run(option, self.folder, names=[str(self.folder)])
        self.refuse("plan", *self.inputs(), "--svg", self.path("q.npy"), names=["is an input"])
        self.refuse("plan", *self.inputs(), "--svg", self.path("q.npy"), "--overwrite", names=["is an input"])
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "plan", *map(str, self.inputs())], stdout=full, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, 1)
        self.refuse_run("--output-dtype", "bf16", names=["bf", "--output-dtype f32"])


class MidRun(CliTest):

    def leaves_nothing(self):
        self.assertEqual([path.name for path in self.folder.iterdir() if "o." in path.name], [])

    def start(self, *options):
        """Starts a run and waits until its output has its full size, with hardly anything in it."""
        command = [PROGRAM, "run", *map(str, self.inputs()), "--output", str(self.path("o.npy")), "--quiet",
                   *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        partial = self.path("o.npy.partial")
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > 0):
            time.sleep(0.001)
        return process

    def test_a_disk_that_fills(self):
        self.save_inputs(shape=(1, 12000, 1, 64))
        with self.start("--chunks", "7", "--threads", "1") as process:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
            error = process.communicate()[1]
        self.assertEqual(process.returncode, 1, error)
        # Open MPI may say something of its own before.
        line = error.strip().splitlines()[-1]
        self.assertTrue(line.startswith("stream-cqsa: "), line)
        self.assertIn("o.npy", line)
        self.assertIn("File too large", line)
        self.leaves_nothing()

    def test_an_input_that_becomes_unreadable(self):
        self.save_inputs(shape=(1, 30000, 1, 64))
        with self.start("--host-memory", "12MiB", "--device-memory", "3MiB", "--threads", "1") as process:
            with open(self.path("k.npy"), "r+b") as file:
                file.truncate(4096)
            error = process.communicate()[1]
        self.assertEqual(process.returncode, 1, error)
        self.assertIn("k.npy", error)
        self.leaves_nothing()


class Room(CliTest):
    """Disks that are too small for a run: said before it begins, with what it needs."""

    # Accumulators of 12 MiB, an output of 4.9 MiB.
    options = ["run", "--input", "synthetic:1", "--shape", "1,20000,2,64", "--causal", "--chunks", "31",
               "--device-memory", "8MiB", "--quiet"]

    def on_a_disk_of(self, size, *arguments):
        """The program as it sees a file system of that size at self.disk."""
        self.disk.mkdir(exist_ok=True)
        script = f"mount -t tmpfs -o size={size} none '{self.disk}' && exec \"$@\""
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=250)

    def setUp(self):
        super().setUp()
        self.disk = self.path("disk")
        if shutil.which("unshare") is None or self.on_a_disk_of("1m", "true").returncode != 0:
            self.skipTest("no file systems of one's own here")

    def refuse_on(self, size, *options, names):
        done = self.on_a_disk_of(size, PROGRAM, *self.options, *options)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        for name in names:
            self.assertIn(name, done.stderr)

    def test_each_of_what_a_run_writes(self):
        here, there = self.path("o.npy"), self.disk / "o.npy"
        little = ["--host-memory", "2MiB"]
        self.refuse_on("2m", *little, "--output", here, "--scratch", self.disk,
                       names=["--scratch", "needs 12.59 MiB", "2.00 MiB are free there"])
        self.refuse_on("2m", "--output", there, names=["o.npy: needs 4.88 MiB", "2.00 MiB are free"])
        self.refuse_on("100k", "--output", here, "--lse", self.disk / "lse.npy", names=["lse.npy: needs 156"])
        self.refuse_on("2m", "--output", here, "--checkpoint", self.disk / "ckpt",
                       names=["--checkpoint", "needs 14.4", "are free there"])
        self.assertFalse(here.exists())

    def test_all_that_goes_to_one_disk(self):
        there = self.disk / "o.npy"
        little = ["--host-memory", "2MiB"]
        self.refuse_on("13m", *little, "--output", there, "--scratch", self.disk,
                       names=["--scratch", "o.npy", "need 17.48 MiB together", "13.00 MiB are free there"])
        self.refuse_on("15m", "--output", there, "--checkpoint", self.disk / "ckpt",
                       names=["--checkpoint", "o.npy", "together", "15.00 MiB are free there"])
        done = self.on_a_disk_of("18m", PROGRAM, *self.options, *little, "--output", there, "--scratch", self.disk)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_disk_that_cannot_be_written(self):
        script = f"mount -o remount,ro '{self.disk}' && exec \"$@\""
        done = self.on_a_disk_of("18m", "sh", "-c", script, "sh", PROGRAM, *self.options, "--output",
                                 self.path("o.npy"), "--scratch", self.disk)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("cannot be written: Read-only file system", done.stderr)


class Budgets(CliTest):
    """Budgets that are too small: the message says which, and what it names works."""

    options = ["--input", "synthetic:1", "--shape", "1,40000,2,64", "--causal", "--chunks", "31"]

    def plan(self, device, host, *more):
        return run_program("plan", *self.options, "--device-memory", device, "--host-memory", host, *more)

    def named(self, done):
        self.assertEqual(done.returncode, 2)
        self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        return done.stderr, [int(number) for number in re.findall(r"\((\d+) bytes\)", done.stderr)]

    def test_which_is_short_and_what_works(self):
        for device, host, short in [("2MiB", "1GiB", "device"), ("1GiB", "2MiB", "host")]:
            line, (least, *with_scratch) = self.named(self.plan(device, host))
            self.assertIn(f"stream-cqsa: {short} memory 2.00 MiB is too small", line)
            budgets = lambda bytes: (bytes, host) if short == "device" else (device, bytes)
            self.assertEqual(self.plan(*budgets(least)).returncode, 0)
            self.assertEqual(self.plan(*budgets(least - 1)).returncode, 2)
            for bytes in with_scratch:
                self.assertEqual(self.plan(*budgets(bytes), "--scratch", self.folder).returncode, 0)
        line, (least_device, least_host, *_) = self.named(self.plan("2MiB", "2MiB"))
        self.assertIn("both too small", line)
        self.assertEqual(self.plan(least_device, least_host).returncode, 0)

    def test_a_disk_may_stand_in_for_device_memory(self):
        # With so little host memory only one chunk needs no accumulators, and it fills the device.
        self.options = ["--input", "synthetic:1", "--shape", "1,40000,2,64", "--causal"]
        line, (least, with_scratch) = self.named(self.plan("1MiB", "4MiB"))
        self.assertIn("device memory 1.00 MiB is too small", line)
        self.assertIn("with --scratch", line)
        self.assertLess(with_scratch, least)
        self.assertEqual(self.plan(with_scratch, "4MiB", "--scratch", self.folder).returncode, 0)


if __name__ == "__main__":
    unittest.main()
