"""The peers that bench_peers.py times beside our program.

Resident ones hold everything in device memory: flash2 and cudnn are torch's scaled_dot_product_attention
with that backend pinned; flash3 (flash_attn_interface) and flash4 (flash_attn.cute) are packages.
Streamed ones go from pinned host memory to host memory, each in a process of its own, which this file
is the program of: stream_cqsa (PyPI's stream-cqsa, by the method's authors) and seqattn.
"""

import contextlib
import importlib
import importlib.metadata
import json
import math
import sys
import time
from dataclasses import asdict

from bench_turns import Child, Failure, one_line
from problem import Shape

GIB = 1 << 30
TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
RESIDENT_PEERS = ("flash2", "cudnn", "flash3", "flash4")
MODULES = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
# Entry -> package and options. The authors' package: by its own plan under a cap of the whole process, and
# one level of c = 7, streamed from the host with the accumulator on the device: what it chooses without a
# cap where it divides at all (what fits it leaves to torch). seqattn's budget is of the buffers that it allocates.
STREAMED_PEERS = {"stream_cqsa 1GiB": {"package": "stream_cqsa", "cap": GIB, "overrides": {}},
                  "stream_cqsa no limit": {"package": "stream_cqsa", "cap": None, "overrides": {
                      "itr": 1, "c": 7, "interest_set": (0, 1, 3), "stream_from_host": True,
                      "accumulate_on_gpu": True}},
                  "seqattn 1GiB": {"package": "seqattn", "cap": GIB}}
PEERS = (*RESIDENT_PEERS, "stream_cqsa", "seqattn")
# seqattn's launch parameters to choose from: its own (64, 64, 4, 2, nothing for this GPU) and larger tiles.
SEQATTN_LAUNCHES = ({}, *({"block_m": rows, "block_n": keys, "num_warps": warps, "num_stages": stages}
                          for rows, keys, warps, stages in ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3),
                                                            (128, 128, 8, 2))))
SEQATTN_TRIAL = 131072  # tokens of the problem that decides
SEQATTN_BLOCKS = 16     # of queries, in a causal problem
WRONG = 0.02            # a relative error that no rounding explains


class Resident:
    """A peer's attention with everything in device memory, timed by device events."""
    key = "kernel_seconds"

    def __init__(self, torch, name, tensors, causal):
        self.torch, self.call, self.tensors = torch, resident_call(torch, name, causal), tensors
        self.name, self.causal, self.error = name, causal, None

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
        return {"package": distributions(MODULES.get(self.name, "torch")), "verification": verified(self.error)}


def distributions(module):
    """The installed distributions that a module is of, with their versions."""
    names = importlib.metadata.packages_distributions().get(module.split(".")[0], [])
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


def resident_call(torch, name, causal):
    """f(q, k, v) -> O, all [B, N, H, D]. Throws ImportError or Failure where there is no such peer."""
    if name in MODULES:
        module = importlib.import_module(MODULES[name])

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
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
                enable_gqa=k.shape[2] != q.shape[2]).transpose(1, 2)
    return pinned


def reference_rows(torch, q, k, v, rows, head, causal):
    """fp64 attention of some rows of one query head, [rows, D]; q, k, v: [1, N, H, D]."""
    length, dim = q.shape[1], q.shape[3]
    kv_head = head // (q.shape[2] // k.shape[2])
    scores = q[0, rows, head].double() @ k[0, :, kv_head].double().T * dim ** -0.5
    if causal:
        later = torch.arange(length, device=q.device)[None, :] > rows[:, None]
        scores.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v[0, :, kv_head].double()


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
    for heads in (shape.heads, shape.kv_heads or shape.heads, shape.kv_heads or shape.heads):
        made = torch.randn((1, shape.length, heads, shape.dim), device=device,
                           dtype=getattr(torch, TORCH_NAMES[shape.dtype]))
        tensors.append(made.cpu().pin_memory() if pinned else made)
    return tensors


# ---------------------------------------------------------------------------------------------
# Streamed peers: open_PEER(torch, shape, q, k, v, options) -> (call, about), where call() computes once
# and gives (O, what it says of itself), O [1, N, H, D] in host memory; `about` describes the package.


def open_stream_cqsa(torch, shape, q, k, v, options):
    package = importlib.import_module("stream_cqsa")
    if options["cap"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options["cap"] / total)
    overrides = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in options["overrides"].items()}
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def call():
        output, info = package.attention(*heads_first, is_causal=shape.causal, return_info=True, **overrides)
        kept = ("engine", "itr", "c", "n_subproblems", "n_parallel", "oom_retries", "depth_escalations")
        return output.transpose(1, 2), {key: info.get(key) for key in kept}
    # Its info names the CUDA extension even where that is not built and Triton runs.
    return call, {"version": package.__version__, "kernels": package.kernels_available()}


def open_seqattn(torch, shape, q, k, v, options):
    package = seqattn_package()
    output = torch.empty_like(q[0]).pin_memory()

    def runner_of(launch):
        config = package.StreamingAttentionConfig(workspace_budget_bytes=options["cap"], **launch)
        plan = package.build_plan(q_heads=shape.heads, kv_heads=shape.heads, head_dim=shape.dim, dtype=q.dtype,
                                  device="cuda", max_q_tokens=shape.length, max_kv_tokens=shape.length, config=config)
        return package.StreamingAttentionRunner(plan, config)

    def attend(runner, length):
        # It reads all keys whatever the mask: a causal problem is cut into blocks of queries, each with its keys alone.
        step = -(-length // SEQATTN_BLOCKS) if shape.causal else length
        for begin in range(0, length, step):
            end = min(begin + step, length)
            keys = end if shape.causal else length
            bounds = (torch.tensor([0, count], dtype=torch.int32) for count in (end - begin, keys))
            runner(q[0][begin:end], k[0][:keys], v[0][:keys], *bounds, causal=shape.causal, out=output[begin:end])

    runners, about = [], {"version": getattr(package, "__version__", None)}

    def call():
        if not runners:  # in the warm-up, when the GPU is this process's alone
            about["launch"] = fastest_launch(lambda launch: attend(runner_of(launch), min(shape.length, SEQATTN_TRIAL)))
            torch.cuda.empty_cache()
            runners.append(runner_of(about["launch"]))
            about["backend"] = getattr(runners[0], "backend", None)
        attend(runners[0], shape.length)
        return output[None], {key: getattr(runners[0].plan, key, None)
                              for key in ("q_chunk_tokens", "kv_chunk_tokens", "estimated_workspace_bytes")}
    return call, about


def fastest_launch(attend):
    """The seqattn launch parameters with which attend(launch) takes the least time, once they are compiled."""
    seconds = {}
    for number, launch in enumerate(SEQATTN_LAUNCHES):
        with contextlib.suppress(Exception):  # some do not fit on some GPUs
            attend(launch)
            begin = time.perf_counter()
            attend(launch)
            seconds[number] = time.perf_counter() - begin
    return SEQATTN_LAUNCHES[min(seconds, key=seconds.get, default=0)]


def seqattn_package():
    """The package, under either of its names. PyPI has another seqattn, a paged key/value cache."""
    found = []
    for name in ("seqattn", "seqattn_core"):
        with contextlib.suppress(ModuleNotFoundError):
            package = importlib.import_module(name)
            if hasattr(package, "StreamingAttentionRunner"):
                return package
            found.append(f"{name} {getattr(package, '__version__', '')} has no StreamingAttentionRunner: "
                         "another package of that name")
    raise Failure("; ".join(found) or "No module named 'seqattn' or 'seqattn_core'")


OPEN = {"stream_cqsa": open_stream_cqsa, "seqattn": open_seqattn}


def streamed_child(shape, options, seconds_in_all):
    """The process of a streamed peer, as a competitor."""
    options = json.dumps({"shape": asdict(shape), **options})
    return Child([sys.executable, __file__, options], "seconds", seconds_in_all)


def serve(options, rounds):
    """Runs a streamed peer once for each line of `rounds` and answers as Child expects."""
    torch = importlib.import_module("torch")
    shape = Shape(**options["shape"])
    q, k, v = random_tensors(torch, shape, "cuda", pinned=True)
    torch.cuda.empty_cache()
    output = None
    with torch.no_grad():
        call, about = OPEN[options["package"]](torch, shape, q, k, v, options)
        for _ in rounds:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            output, said = call()
            torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - begin,
                      "device_bytes": torch.cuda.max_memory_reserved(), **said}
            print(json.dumps(answer, default=str), file=sys.stderr, flush=True)
    if output is not None:
        about["verification"] = verified(sampled_error(torch, output.cpu(), q, k, v, shape.causal))
    print(json.dumps(about, default=str))


def main(arguments):
    try:
        serve(json.loads(arguments[0]), sys.stdin)
    except Exception as error:  # a peer may fail in any way; the last line is its error
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
