"""What the command-line tests share: running the program, small inputs, attention by definition."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
import unittest

import numpy as np

PROGRAM = os.environ["STREAM_CQSA_PROGRAM"]

# Open MPI without a launcher of its own starts at once, but keeps its files in a folder that all such
# processes of a machine would share: each test program has another.
SESSIONS = tempfile.TemporaryDirectory(prefix="stream-cqsa-mpi-")
os.environ["OMPI_MCA_ess_singleton_isolated"] = "1"
os.environ["OMPI_MCA_orte_tmpdir_base"] = SESSIONS.name
# Plans are chosen by built-in costs, not by what was measured here.
os.environ["XDG_CACHE_HOME"] = SESSIONS.name

# Of a machine that no test depends on.
RATES = {"copy_in_bytes_per_second": 5e9, "copy_out_bytes_per_second": 5e9, "device_merge_bytes_per_second": 8e9,
         "merge_bytes_per_second": 8e9, "read_bytes_per_second": 2e9, "generate_bytes_per_second": 2e9,
         "write_bytes_per_second": 1e9, "rewrite_bytes_per_second": 1e9, "receive_bytes_per_second": 2e9,
         "start_seconds": 1e-3}


def run_program(*arguments, **keywords):
    """Runs stream-cqsa and returns the finished process, with text output."""
    command = [PROGRAM] + [str(argument) for argument in arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, **keywords)


def attention(query, key, value, causal=False, scale=None):
    """softmax(scale Q K^T) V in float64: [B, N, H, D] in and out, and lse [B, H, N]."""
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    ratio = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, ratio, axis=2), np.repeat(value, ratio, axis=2)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) * scale
    queries, keys = scores.shape[2:]
    if causal:
        hidden = np.arange(keys)[None, :] > np.arange(queries)[:, None] + keys - queries
        scores[..., hidden] = -np.inf
    with np.errstate(invalid="ignore", divide="ignore"):
        top = scores.max(axis=3, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = weights.sum(axis=3, keepdims=True)
        output = np.einsum("bhnm,bmhd->bnhd", np.where(total == 0, 0, weights / total), value)
        lse = np.where(np.isneginf(top), -np.inf, top + np.log(total))[..., 0]
    return output, lse


def write_safetensors(path, tensors, header=None):
    """Writes {name: array} (float16, float32 or float64), or the raw header text given."""
    names = {"float16": "F16", "float32": "F32", "float64": "F64"}
    entries, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        entries[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                         "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = (json.dumps(entries) if header is None else header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path):
    """Reads {name: float64 array}, bfloat16 included."""
    raw = pathlib.Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin:8 + length + end]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data, {"F16": np.float16, "F32": np.float32,
                                         "F64": np.float64}[entry["dtype"]])
        tensors[name] = array.astype(np.float64).reshape(entry["shape"])
    return tensors


class CliTest(unittest.TestCase):
    """A test with a folder of its own, in which Q, K and V may be saved as .npy."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="stream-cqsa-test-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, name):
        return self.folder / name

    def random(self, shape, dtype, seed):
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

    def save_inputs(self, shape=(1, 200, 2, 16), kv_shape=None, dtype=np.float32):
        """Writes q.npy, k.npy and v.npy and returns the arrays."""
        kv_shape = kv_shape or shape
        arrays = [self.random(shape, dtype, 1), self.random(kv_shape, dtype, 2),
                  self.random(kv_shape, dtype, 3)]
        for name, array in zip("qkv", arrays):
            np.save(self.path(f"{name}.npy"), array)
        return arrays

    def save_costs(self, flop_per_second=1e11, launch_seconds=1e-5, threads=1, **changes):
        """The CPU's costs for so many threads, by which plans of this test are chosen from now on."""
        before = os.environ["XDG_CACHE_HOME"]
        self.addCleanup(os.environ.update, {"XDG_CACHE_HOME": before})
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        done = self.succeed("plan", "--input", "synthetic:1", "--shape", "1,64,1,64", "--threads", threads,
                            "--backend", "cpu", "--json")
        traits = json.loads(done.stdout)["request"]["device"]
        device = traits["name"] or traits["kind"]
        kernels = [{"head_dim": dim, "dtype": "f32", "mask": mask, "flop_per_second": flop_per_second,
                    "burst_flop_per_second": flop_per_second, "launch_seconds": launch_seconds}
                   for dim in (64, 128) for mask in ("none", "causal")]
        folder = self.folder / "cache" / "stream-cqsa"
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub("[^A-Za-z0-9]+", "-", "costs-" + device)
        (folder / f"{name}.json").write_text(json.dumps(
            {"version": 1, "device": device, **RATES, **changes, "kernels": kernels}))

    def progress(self):
        """What a run with the checkpoint `ckpt` has left there by now: it changes while one works."""
        found = {}
        for path in [*self.folder.glob("ckpt/**/journal"), *self.folder.glob("ckpt/**/states")]:
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (status.st_size, status.st_mtime_ns)
        return found

    def wait_for_progress(self, process, before):
        while process.poll() is None and self.progress() == before:
            time.sleep(0.002)

    def inputs(self):
        return ["--query", self.path("q.npy"), "--key", self.path("k.npy"),
                "--value", self.path("v.npy")]

    def succeed(self, *arguments, **keywords):
        done = run_program(*arguments, **keywords)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def refuse(self, *arguments, status=2, names=(), **keywords):
        """The program ends with `status` and one line on stderr that contains each of `names`."""
        done = run_program(*arguments, **keywords)
        self.assertEqual(done.returncode, status, f"{arguments}\n{done.stdout}\n{done.stderr}")
        lines = done.stderr.strip().splitlines()
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertTrue(lines[0].startswith("stream-cqsa: "), lines[0])
        for name in names:
            self.assertIn(name, lines[0])
        return lines[0]
