#!/usr/bin/env python3
"""Stream-CQSA beside its peers, in turn on one GPU.

Sections, each with a result file of its own in the output directory, rewritten after every shape:

    kernel         one resident subproblem beside resident FlashAttention and cuDNN
    decomposition  the kernel's time, summed over the subproblems, at several c
    stream         host memory to host memory under 1 GiB beside resident attention and streamed peers
    sweep          the same problem under growing device budgets beside our own resident kernel
    accuracy       errors against fp64, of ours and of the peers, on the same input

The peers: flash2 and cudnn are torch's scaled_dot_product_attention with that backend pinned; flash3
(flash_attn_interface), flash4 (flash_attn.cute) and stream_cqsa (PyPI's stream-cqsa, by the method's
authors) take part where they can be imported. A peer that fails is recorded with its message.

Timed: rounds in turn, A B A B, after a round of warm-up; what counts is the median. Resident attention
is timed by device events and streamed attention by the wall clock, both on random input.
Exit status: 0 done, 1 our program failed somewhere or was wrong, 2 wrong usage.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import pathlib
import platform
import pty
import queue
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass

GIB = 1 << 30
TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16"}
RESIDENT_PEERS = ("flash2", "cudnn", "flash3", "flash4")
# The authors' package: by its own plan under a cap, and one level of c = 7, streamed from the host with
# the accumulator on the device, its default way with all the memory it wants.
STREAMED_PEERS = {"stream_cqsa 1GiB": {"cap": GIB, "overrides": {}},
                  "stream_cqsa no limit": {"cap": None, "overrides": {
                      "itr": 1, "c": 7, "interest_set": (0, 1, 3), "stream_from_host": True,
                      "accumulate_on_gpu": True}}}
RESIDENT_MEMORY = ("--device-memory", "64GiB", "--host-memory", "16GiB")
ROUND_SECONDS = 300     # how long a round of ours may take, reading its input included
WRONG = 0.02            # a relative error that no rounding explains


class Failure(Exception):
    """A competitor cannot go on; the message is one line."""


@dataclass(frozen=True)
class Shape:
    """Self-attention of one sequence: [1, length, heads, dim]."""
    length: int
    heads: int
    dim: int
    dtype: str
    causal: bool

    def flops(self):
        kept = self.length * (self.length + 1) // 2 if self.causal else self.length ** 2
        return 4 * self.dim * self.heads * kept

    def options(self):
        options = ["--shape", f"1,{self.length},{self.heads},{self.dim}", "--dtype", self.dtype]
        return options + ["--causal"] * self.causal

    def __str__(self):
        return (f"N={self.length} H={self.heads} D={self.dim} {self.dtype} "
                f"{'causal' if self.causal else 'full'}")


def without_folders(text):
    """The text with each absolute path cut down to its last name."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)*", "", text)


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, Failure) else type(error).__name__ + ": "
    return without_folders(kind + (lines or [""])[0])[:300]


# ---------------------------------------------------------------------------------------------
# What is timed: each competitor has round() -> {"seconds" and/or "kernel_seconds", ...}, finish()
# -> what it says at the end, and `key`, the time that is compared.


class Child:
    """A program that starts a round for each line it reads and answers with a line of JSON on
    standard error; at the end of its input it prints a JSON document on standard output."""

    def __init__(self, command, key, seconds_in_all=None):
        self.key = key
        self.command = without_folders(shlex.join(command))
        self.seconds_left = seconds_in_all
        self.answers, self.said = queue.Queue(), []
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.output,
                                        stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            if line.startswith("{"):
                self.answers.put(json.loads(line))
            elif line.strip():
                self.said.append(line.strip())
        self.answers.put(None)

    def _fail(self, message=None):
        self.process.kill()
        self.process.wait()
        if message is None:  # what it said last; a launcher may have added to it
            self.reader.join(timeout=10)
            errors = [line for line in self.said if line.startswith("stream-cqsa:")]
            message = (errors or self.said or ["ended without a word"])[-1]
        raise Failure(message)

    def round(self):
        begin = time.monotonic()
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=self.seconds_left or ROUND_SECONDS)
        except queue.Empty:
            self._fail(f"the time limit ended this round after {time.monotonic() - begin:.0f} s")
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._fail()
        if self.seconds_left:
            self.seconds_left = max(0.1, self.seconds_left - (time.monotonic() - begin))
        return answer

    def finish(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            status = self.process.wait(timeout=ROUND_SECONDS)
        except subprocess.TimeoutExpired:
            self._fail("did not end")
        if status != 0:
            self._fail()
        self.output.seek(0)
        return json.loads(self.output.read())


class Program(Child):
    """Our own program's `bench --only stream`; it checks its result against fp64 itself."""

    def __init__(self, bench, shape, key, *options):
        arguments = ["bench", "--only", "stream", "--backend", bench.backend, *shape.options(),
                     *options, "--rounds", "1000", "--lockstep", "--json"]
        super().__init__([*bench.launcher, bench.program, *arguments], key)

    def finish(self):
        result = super().finish()["stream"]
        kept = ("c", "head_groups", "subproblems", "device_memory", "host_memory")
        checked = {key: result["verification"][key] for key in ("ok", "compared")}
        return {**{key: result[key] for key in kept}, "verification": checked}


class Resident:
    """A peer's attention with everything in device memory, timed by device events."""
    key = "kernel_seconds"

    def __init__(self, torch, name, tensors, causal):
        self.torch, self.call, self.tensors = torch, resident_call(torch, name, causal), tensors
        self.causal, self.error = causal, None

    def round(self):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        output = self.call(*self.tensors)
        end.record()
        end.synchronize()
        if self.error is None:
            self.error = sampled_error(self.torch, output, *self.tensors, self.causal)
        return {"kernel_seconds": begin.elapsed_time(end) * 1e-3}

    def finish(self):
        return {"verification": verified(self.error)}


def resident_call(torch, name, causal):
    """f(q, k, v) -> O, all [B, N, H, D]. Throws ImportError or Failure where there is no such peer."""
    if name in ("flash3", "flash4"):
        module = importlib.import_module({"flash3": "flash_attn_interface",
                                          "flash4": "flash_attn.cute"}[name])

        def flash(q, k, v):
            with torch.no_grad():
                output = module.flash_attn_func(q, k, v, causal=causal)
            return output[0] if isinstance(output, tuple) else output
        return flash
    attention = importlib.import_module("torch.nn.attention")
    backend = {"flash2": attention.SDPBackend.FLASH_ATTENTION,
               "cudnn": attention.SDPBackend.CUDNN_ATTENTION}[name]

    def pinned(q, k, v):
        with torch.no_grad(), attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal).transpose(1, 2)
    return pinned


def reference_rows(torch, q, k, v, rows, head, causal):
    """fp64 attention of some rows of one head, [rows, D]; q, k, v: [1, N, H, D]."""
    length, dim = q.shape[1], q.shape[3]
    scores = q[0, rows, head].double() @ k[0, :, head].double().T * dim ** -0.5
    if causal:
        later = torch.arange(length, device=q.device)[None, :] > rows[:, None]
        scores.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v[0, :, head].double()


def sampled_error(torch, output, q, k, v, causal):
    """Relative Frobenius error of a few rows of the first and the last head."""
    length, heads = q.shape[1:3]
    rows = torch.tensor([length // 3, length // 2, 2 * length // 3, length - 1], device=q.device)
    wrong, size = 0.0, 0.0
    for head in {0, heads - 1}:
        expected = reference_rows(torch, q, k, v, rows, head, causal)
        wrong += (output[0, rows, head].double() - expected).square().sum().item()
        size += expected.square().sum().item()
    return (wrong / size) ** 0.5


def verified(error):
    return {"ok": error <= WRONG, "relative_error": error if math.isfinite(error) else None}


def random_tensors(torch, shape, device, pinned=False):
    """Q, K and V of normal numbers, [1, N, H, D], made on the device; in pinned memory if asked."""
    tensors = []
    torch.manual_seed(1)
    for _ in range(3):
        made = torch.randn((1, shape.length, shape.heads, shape.dim), device=device,
                           dtype=getattr(torch, TORCH_NAMES[shape.dtype]))
        tensors.append(made.cpu().pin_memory() if pinned else made)
    return tensors


def stream_cqsa_worker(options):
    """A child that runs the authors' package from pinned host memory to host memory."""
    import torch
    import stream_cqsa
    shape = Shape(**options["shape"])
    q, k, v = random_tensors(torch, shape, "cuda", pinned=True)
    torch.cuda.empty_cache()
    if options["cap"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options["cap"] / total)
    overrides = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in options["overrides"].items()}
    output = None
    for _ in sys.stdin:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.no_grad():
            output, info = stream_cqsa.attention(*(x.transpose(1, 2) for x in (q, k, v)),
                                                 is_causal=shape.causal, return_info=True, **overrides)
        torch.cuda.synchronize()
        answer = {"seconds": time.perf_counter() - begin, "device_bytes": torch.cuda.max_memory_reserved(),
                  **{key: info.get(key) for key in ("engine", "kernel", "itr", "c", "n_subproblems")}}
        print(json.dumps(answer, default=str), file=sys.stderr, flush=True)
    result = {"version": stream_cqsa.__version__}
    if output is not None:
        error = sampled_error(torch, output.cpu().transpose(1, 2), q, k, v, shape.causal)
        result["verification"] = verified(error)
    print(json.dumps(result))


# ---------------------------------------------------------------------------------------------
# The device's state and the turns.


class Monitor:
    """nvidia-smi's readings of the first GPU, ten a second, each with the time of its arrival."""

    def __init__(self):
        self.samples, self.process = [], None
        ours, its = pty.openpty()   # a terminal, so that each line comes as it is written
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw,temperature.gpu",
                 "--format=csv,noheader,nounits", "-lms", "100"], stdout=its, stderr=subprocess.DEVNULL)
        except OSError:
            os.close(ours)
            return
        finally:
            os.close(its)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()

    def _read(self, descriptor):
        with contextlib.suppress(OSError), open(descriptor) as lines:   # the terminal ends by an error
            for line in lines:
                with contextlib.suppress(ValueError):
                    self.samples.append((time.monotonic(), *map(float, line.split(","))))

    def between(self, begin, end):
        """The median clock and the highest power and temperature of a span of time."""
        samples = list(self.samples)
        inside = [s for s in samples if begin <= s[0] <= end + 0.1] or samples[-1:]
        if not inside:
            return {}
        _, clocks, watts, celsius = zip(*inside)
        return {"sm_clock_mhz": statistics.median(clocks), "power_watts": max(watts),
                "temperature_celsius": max(celsius), "samples": len(inside)}

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()


def take_turns(entries, rounds, monitor):
    """Runs the competitors in turn, the first round a warm-up, and returns each one's rounds and the
    medians. An entry is name -> a function that makes the competitor; whoever fails drops out."""
    results, competitors = {}, {}
    for name, make in entries.items():
        results[name] = {"rounds": []}
        try:
            competitors[name] = make()
            results[name].update(timed=competitors[name].key)
            if isinstance(competitors[name], Child):
                results[name].update(command=competitors[name].command)
        except Exception as error:  # a peer may fail in any way
            results[name]["error"] = one_line(error)
    for number in range(rounds + 1):
        for name, competitor in competitors.items():
            if "error" not in results[name]:
                one_turn(competitor, results[name], number == 0, monitor)
    for name, competitor in competitors.items():
        finish(competitor, results[name])
    return results


def one_turn(competitor, result, warm_up, monitor):
    begin = time.monotonic()
    try:
        answer = competitor.round()
    except Exception as error:
        result["error"] = one_line(error)
        return
    state = monitor.between(begin, time.monotonic())
    result["rounds"].append({**answer, "warm_up": warm_up, "gpu": state})


def finish(competitor, result):
    """The closing words and the medians of the rounds that count; no medians of wrong results."""
    if "error" not in result:
        try:
            result.update(competitor.finish())
        except Exception as error:
            result["error"] = one_line(error)
            return
        if not result.get("verification", {"ok": True})["ok"]:
            result["error"] = "the result is wrong"
            return
    counted = [one for one in result["rounds"] if not one["warm_up"]]
    for key in ("seconds", "kernel_seconds"):
        if counted and key in counted[0]:
            result[key] = statistics.median(one[key] for one in counted)


def compare(shape, base, results):
    """A row of a result file: each one's time as a rate and over that of the base."""
    for result in results.values():
        mine, of_base = (r.get(r.get("timed")) for r in (result, results[base]))
        if mine:
            result["flop_per_second"] = shape.flops() / mine
            result["over_base"] = mine / of_base if of_base else None
    return {"shape": asdict(shape), "base": base, "results": results}


# ---------------------------------------------------------------------------------------------
# The sections; each yields rows.


class Bench:
    """The options, and what the sections share."""

    def __init__(self, options):
        self.program, self.backend, self.quick = options.program, options.backend, options.quick
        self.launcher = shlex.split(options.launcher)
        self.peers, self.peer_seconds = options.peers, options.peer_seconds
        self.torch = importlib.import_module("torch")
        self.device = options.torch_device
        self.monitor = Monitor()

    def ours(self, shape, key, *options):
        return lambda: Program(self, shape, key, *options)

    def ours_resident(self, shape, groups=None):
        return self.ours(shape, "kernel_seconds", "--chunks", "1", "--heads-per-group",
                         str(groups or shape.heads), *RESIDENT_MEMORY)

    def residents(self, shape):
        """name -> maker, of the peers that hold everything in device memory; they share the input."""
        tensors = []

        def make(name):
            tensors.extend([] if tensors else random_tensors(self.torch, shape, self.device))
            return Resident(self.torch, name, tensors, shape.causal)
        return {name: lambda name=name: make(name) for name in RESIDENT_PEERS if name in self.peers}

    def streamed(self, shape):
        """name -> maker, of the peers that stream; each in a process with a time limit."""
        def make(options):
            options = json.dumps({"shape": asdict(shape), **options})
            return Child([sys.executable, __file__, "--worker", options], "seconds", self.peer_seconds)
        return {name: lambda options=options: make(options) for name, options in STREAMED_PEERS.items()
                if "stream_cqsa" in self.peers}

    def turns(self, shape, base, entries, rounds):
        rounds = 1 if self.quick else rounds
        return compare(shape, base, take_turns(entries, rounds, self.monitor))


def kernel_section(bench):
    for length in (65536,) if bench.quick else (65536, 131072):
        for dim in (64, 128):
            for causal in (False, True):
                shape = Shape(length, 8, dim, "bf16", causal)
                entries = {"ours": bench.ours_resident(shape), **bench.residents(shape)}
                yield bench.turns(shape, "ours", entries, 5)


def decomposition_section(bench):
    shape = Shape(131072 if bench.quick else 1 << 20, 8, 64, "f16", True)
    entries = {f"c={c}": bench.ours(shape, "kernel_seconds", "--chunks", str(c), "--heads-per-group", "1",
                                    *RESIDENT_MEMORY) for c in (1, 7, 31, 133)}
    yield bench.turns(shape, "c=1", entries, 2)


def stream_section(bench):
    scale = 8 if bench.quick else 1
    for shape in (Shape((1 << 20) // scale, 8, 64, "f16", True), Shape((1 << 19) // scale, 8, 128, "bf16", True)):
        entries = {"ours streamed 1GiB": bench.ours(shape, "seconds", "--device-memory", "1GiB",
                                                    "--host-memory", "16GiB"),
                   "ours resident": bench.ours_resident(shape), **bench.residents(shape),
                   **bench.streamed(shape)}
        yield bench.turns(shape, "ours resident", entries, 3)


def sweep_section(bench):
    shape = Shape(131072 if bench.quick else 1 << 20, 8, 64, "f16", True)
    budgets = ("256MiB", "512MiB", "1GiB", "2GiB", "4GiB", "8GiB", "16GiB")
    for budget in budgets[::3] if bench.quick else budgets:
        entries = {"streamed": bench.ours(shape, "seconds", "--device-memory", budget, "--host-memory", "16GiB"),
                   "resident": bench.ours_resident(shape)}
        row = bench.turns(shape, "resident", entries, 2)
        streamed = row["results"]["streamed"]
        if "device_memory" in streamed:
            allocated = sorted({one["device_bytes"] for one in streamed["rounds"]})
            if allocated != [streamed["device_memory"]["planned"]]:
                streamed["error"] = f"allocated {allocated} bytes, not what was planned"
        yield {"budget": budget, **row}


# --- accuracy ---


def accuracy_input(shape, kind):
    """Q, K and V in fp32, [1, N, H, D]: normal numbers; with large scores; or with a first key that
    all queries like."""
    import numpy as np
    rng = np.random.default_rng(20)
    q, k, v = (rng.standard_normal((1, shape.length, shape.heads, shape.dim), dtype=np.float32)
               for _ in range(3))
    if kind == "large scores":
        q, k = 8 * q, 8 * k
    elif kind == "sink":
        along = np.float32(12 ** 0.5 * shape.dim ** -0.25)  # the first key's score is 12 above the others'
        q += along
        k[:, 0] = along
    return q, k, v


def write_safetensors(path, tensors, dtype):
    """tensors: name -> (shape, bytes); all of one dtype."""
    header, offset = {}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, data in tensors.values():
            file.write(data)


def our_output(bench, path, chunks):
    """[1, N, H, D] in fp32, from our program."""
    import numpy as np
    output = path.with_name("o.npy")
    command = [*bench.launcher, bench.program, "run", "--input", str(path), "--causal", "--backend",
               bench.backend, "--output-dtype", "f32", "--output", str(output), "--overwrite", "--quiet",
               "--chunks", str(chunks), "--device-memory", "4GiB", "--host-memory", "4GiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ROUND_SECONDS)
    if done.returncode != 0:
        raise Failure(without_folders((done.stderr.strip() or "failed").splitlines()[0]))
    return bench.torch.from_numpy(np.load(output)).to(bench.device)


def errors_of(torch, output, rows, expected):
    """output: [1, N, H, D]; expected: [H, rows, D] in fp64."""
    wrong = output[0, rows].double().transpose(0, 1) - expected
    if not bool(torch.isfinite(wrong).all()):
        raise Failure("a sampled row is not finite")
    return {"relative_frobenius": (wrong.norm() / expected.norm()).item(), "largest": wrong.abs().max().item()}


def accuracy_case(bench, shape, kind, folder):
    torch, results = bench.torch, {}
    dtype = getattr(torch, TORCH_NAMES[shape.dtype])
    q, k, v = (torch.from_numpy(x).to(dtype) for x in accuracy_input(shape, kind))
    path = pathlib.Path(folder) / "qkv.safetensors"
    write_safetensors(path, {name: (x.shape, x.view(torch.int16).numpy().tobytes())
                             for name, x in (("q", q), ("k", k), ("v", v))}, shape.dtype)
    q, k, v = (x.to(bench.device) for x in (q, k, v))
    torch.manual_seed(1)
    # A row with few keys is all but a copy of V: the first rows would hide the others' errors.
    rows = torch.randint(shape.length // 16, shape.length, (256,), device=q.device)
    expected = torch.stack([reference_rows(torch, q, k, v, rows, head, shape.causal)
                            for head in range(shape.heads)])

    def record(name, make, *roundings):
        try:
            output = make()
            results[name] = errors_of(torch, output, rows, expected)
            for to in roundings:
                results[f"{name} {shape.dtype}"] = errors_of(torch, output.to(to), rows, expected)
        except Exception as error:
            results[name] = {"error": one_line(error)}
    for chunks in (1, 7):
        record(f"ours c={chunks}", lambda: our_output(bench, path, chunks), dtype)
    for name in (name for name in RESIDENT_PEERS if name in bench.peers):
        record(name, lambda: resident_call(torch, name, shape.causal)(q, k, v))
    rounded = expected.to(dtype).double() - expected
    results["fp64 " + shape.dtype] = {"relative_frobenius": (rounded.norm() / expected.norm()).item(),
                                      "largest": rounded.abs().max().item()}
    return {"shape": asdict(shape), "input": kind, "rows_per_head": len(rows), "results": results}


def accuracy_section(bench):
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("normal", "large scores", "sink"):
            for dim in (64,) if bench.quick else (64, 128):
                for dtype in ("f16", "bf16"):
                    yield accuracy_case(bench, Shape(2048 if bench.quick else 16384, 4, dim, dtype, True), kind, folder)


SECTIONS = {"kernel": kernel_section, "decomposition": decomposition_section, "stream": stream_section,
            "sweep": sweep_section, "accuracy": accuracy_section}

# ---------------------------------------------------------------------------------------------
# Files and tables.


def output_of(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def conditions(bench):
    """Where and by what the numbers were taken."""
    torch = bench.torch
    device = output_of(["nvidia-smi", "-i", "0", "--query-gpu=name,driver_version,power.limit,memory.total",
                        "--format=csv,noheader"]).split(", ")
    version = output_of([*bench.launcher, bench.program, "--version"])
    return {"command": without_folders(shlex.join(["bench_peers.py", *sys.argv[1:]])),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "program": [" ".join(line.split()) for line in version.splitlines()],
            "device": dict(zip(("name", "driver", "power_limit", "memory"), device)),
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version()}


def write(path, result):
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def sound(row):
    """Whether ours did its work in this row, and correctly."""
    for name, result in row["results"].items():
        ours = name.startswith(("ours", "c=", "streamed", "resident"))
        if ours and "error" in result:
            return False
    return True


def timing_line(name, result):
    rounds = [one for one in result["rounds"] if not one["warm_up"]]
    if "flop_per_second" not in result:
        return f"  {name:<22} {result.get('error', 'no round that counts')}"
    text = f"  {name:<22} {result[result['timed']]:>9.4f} s  {result['flop_per_second'] * 1e-12:>6.1f} TFLOP/s"
    text += f"  {result['over_base']:>6.3f} of base" if result["over_base"] else ""
    for key, unit in (("sm_clock_mhz", "MHz"), ("power_watts", "W")):
        values = [one["gpu"][key] for one in rounds if key in one["gpu"]]
        text += f"  {statistics.median(values):>5.0f} {unit}" if values else ""
    if "c" in result:
        text += f"  c={result['c']}, {result['subproblems']} subproblems, {result['device_memory']['planned']} B"
    return text + (f"  ({result['error']})" if "error" in result else "")


def table(row):
    """A row as lines of text."""
    where = row.get("input") or (f"budget {row['budget']}" if "budget" in row else f"base: {row['base']}")
    lines = [f"{Shape(**row['shape'])}, {where}"]
    for name, result in row["results"].items():
        if "rounds" in result:
            lines.append(timing_line(name, result))
        elif "error" in result:
            lines.append(f"  {name:<22} {result['error']}")
        else:
            lines.append(f"  {name:<22} {result['relative_frobenius']:.3e} relative, {result['largest']:.3e} largest")
    return "\n".join(lines)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda known: lambda text: [known[list(known).index(name)] for name in text.split(",")]
    parser.add_argument("--program", required=True, help="stream-cqsa")
    parser.add_argument("--launcher", default="mpirun --bind-to none -n 1",
                        help="what starts it (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, type=pathlib.Path)
    parser.add_argument("--sections", type=names(list(SECTIONS)), default=list(SECTIONS), help="a,b,... (default: all)")
    peers = [*RESIDENT_PEERS, "stream_cqsa"]
    parser.add_argument("--peers", type=names(peers), default=peers, help="a,b,... (default: all)")
    parser.add_argument("--peer-seconds", type=float, default=60, help="of each streamed peer (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few small shapes, one round: a trial, not a measurement")
    parser.add_argument("--backend", default="cuda", help="of our program (default: %(default)s)")
    parser.add_argument("--torch-device", default="cuda", help="of the peers (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments):
    if arguments[:1] == ["--worker"]:
        stream_cqsa_worker(json.loads(arguments[1]))
        return 0
    options = parse_arguments(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    bench, tables, ok = Bench(options), [], True
    head = conditions(bench)
    for name in options.sections:
        rows, begin = [], time.monotonic()
        for row in SECTIONS[name](bench):
            rows.append(row)
            seconds = time.monotonic() - begin
            write(options.output_dir / f"gpu_{name}.json", {"section": name, **head, "seconds": seconds, "rows": rows})
            tables.append(table(row))
            print(f"[{name}, {seconds:.0f} s] {tables[-1]}", flush=True)
            ok = ok and sound(row)
    bench.monitor.close()
    print("\n" + "\n".join(tables))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
