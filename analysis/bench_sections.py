"""The sections of bench_peers.py; each yields the rows of its result file."""

import importlib
import shlex

from bench_accuracy import accuracy_section
from bench_turns import Child, Monitor, compare, take_turns
from peers import RESIDENT_PEERS, STREAMED_PEERS, Resident, random_tensors, streamed_child
from problem import Shape

BUDGETS = ("256MiB", "512MiB", "1GiB", "2GiB", "4GiB", "8GiB", "16GiB")
RESIDENT_MEMORY = ("--device-memory", "64GiB", "--host-memory", "16GiB")


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


class Bench:
    """The options, and what the sections share."""

    def __init__(self, options):
        self.program, self.backend, self.quick = options.program, options.backend, options.quick
        self.launcher = shlex.split(options.launcher)
        self.budgets = options.budgets
        self.peers, self.peer_seconds = options.peers, options.peer_seconds
        self.torch = importlib.import_module("torch")
        self.device = options.torch_device
        self.monitor = Monitor()

    def ours(self, shape, key, *options):
        return lambda: Program(self, shape, key, *options)

    def ours_resident(self, shape, groups=None):
        return self.ours(shape, "kernel_seconds", "--chunks", "1", "--heads-per-group",
                         str(groups or shape.kv_heads or shape.heads), *RESIDENT_MEMORY)

    def residents(self, shape):
        """name -> maker, of the peers that hold everything in device memory; they share the input."""
        tensors = []

        def make(name):
            tensors.extend([] if tensors else random_tensors(self.torch, shape, self.device))
            return Resident(self.torch, name, tensors, shape.causal)
        return {name: lambda name=name: make(name) for name in RESIDENT_PEERS if name in self.peers}

    def streamed(self, shape):
        """name -> maker, of the peers that stream; each in a process with a time limit."""
        return {name: lambda options=options: streamed_child(shape, options, self.peer_seconds)
                for name, options in STREAMED_PEERS.items() if options["package"] in self.peers}

    def turns(self, shape, base, entries, rounds):
        rounds = 1 if self.quick else rounds
        return compare(shape, base, take_turns(entries, rounds, self.monitor))


# Beside which FlashAttention-3's rate over cuDNN's is known on an H100, see kernel_notes.md.
KERNEL_SHAPES = [Shape(length, 8, dim, "bf16", causal)
                 for length in (65536, 131072, 262144) for dim in (64, 128) for causal in (False, True)] + [
    Shape(1 << 20, 8, 64, "f16", True), Shape(1 << 19, 8, 128, "bf16", True),
    Shape(131072, 32, 128, "bf16", True, 8)]


def kernel_section(bench):
    for shape in [Shape(65536, 8, 64, "bf16", True)] if bench.quick else KERNEL_SHAPES:
        entries = {"ours": bench.ours_resident(shape), **bench.residents(shape)}
        yield bench.turns(shape, "ours", entries, 3)


def decomposition_section(bench):
    shape = Shape(131072 if bench.quick else 1 << 20, 8, 64, "f16", True)
    def ours(chunks, heads):
        return bench.ours(shape, "kernel_seconds", "--chunks", str(chunks), "--heads-per-group", str(heads),
                          *RESIDENT_MEMORY)
    entries = {f"c={c}": ours(c, shape.heads) for c in (1, 7, 31, 133)}
    # The smallest launches: 1064 of 2 ms.
    entries["c=133, one head at a time"] = ours(133, 1)
    yield bench.turns(shape, "c=1", entries, 3)


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
    for budget in bench.budgets[::3] if bench.quick else bench.budgets:
        entries = {"streamed": bench.ours(shape, "seconds", "--device-memory", budget, "--host-memory", "16GiB"),
                   "resident": bench.ours_resident(shape)}
        row = bench.turns(shape, "resident", entries, 3)
        streamed = row["results"]["streamed"]
        if "device_memory" in streamed:
            allocated = sorted({one["device_bytes"] for one in streamed["rounds"]})
            if allocated != [streamed["device_memory"]["planned"]]:
                streamed["error"] = f"allocated {allocated} bytes, not what was planned"
        yield {"budget": budget, **row}


SECTIONS = {"kernel": kernel_section, "decomposition": decomposition_section, "stream": stream_section,
            "sweep": sweep_section, "accuracy": accuracy_section}
# The peers' entries in a section's rows, by peer.
RESIDENT_ENTRIES = {name: (name,) for name in RESIDENT_PEERS}
STREAMED_ENTRIES = {peer: tuple(name for name, options in STREAMED_PEERS.items() if options["package"] == peer)
                    for peer in ("stream_cqsa", "seqattn")}
SECTION_PEERS = {"kernel": RESIDENT_ENTRIES, "accuracy": RESIDENT_ENTRIES,
                 "stream": {**RESIDENT_ENTRIES, **STREAMED_ENTRIES}}


def absent_peers(section, asked, rows):
    """Entry -> reason, of the section's peers that no row has a result of."""
    absent = {}
    for peer, entries in SECTION_PEERS.get(section, {}).items():
        for entry in entries:
            results = [row["results"][entry] for row in rows if entry in row["results"]]
            if peer not in asked:
                absent[entry] = "not in --peers"
            elif results and all("error" in result and result.get("timed") not in result for result in results):
                absent[entry] = results[0]["error"]
    return absent
