"""The accuracy section of bench_peers.py: errors against fp64, ours and the peers', on the same input."""

import json
import pathlib
import subprocess
import tempfile
from dataclasses import asdict

from bench_turns import ROUND_SECONDS, Failure, one_line, without_folders
from peers import RESIDENT_PEERS, TORCH_NAMES, reference_rows, resident_call
from problem import Shape

OURS = {"ours c=1": 1, "ours c=7": 7}   # name -> chunks


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


def mark_less_exact(results):
    """An error in each result of ours with fp32 output that is not at least as exact as cuDNN's, of 16 bits, where
    that has one; relative_frobenius is what both are held to."""
    theirs = results.get("cudnn", {}).get("relative_frobenius")
    for name in OURS:
        if theirs is None or "error" in results[name]:
            continue
        ours = results[name]["relative_frobenius"]
        if not ours <= theirs:
            results[name]["error"] = f"less exact than cuDNN: {ours:.3e} beside {theirs:.3e} relative"


def accuracy_case(bench, shape, kind, folder):
    torch, results = bench.torch, {}
    dtype = getattr(torch, TORCH_NAMES[shape.dtype])
    q, k, v = (torch.from_numpy(x).to(dtype) for x in accuracy_input(shape, kind))
    path = pathlib.Path(folder) / "qkv.safetensors"
    write_safetensors(path, {name: (x.shape, x.view(torch.uint8).numpy().tobytes())
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
    for name, chunks in OURS.items():
        record(name, lambda: our_output(bench, path, chunks), dtype)
    for name in (name for name in RESIDENT_PEERS if name in bench.peers):
        record(name, lambda: resident_call(torch, name, shape.causal)(q, k, v))
    mark_less_exact(results)
    rounded = expected.to(dtype).double() - expected
    results["fp64 " + shape.dtype] = {"relative_frobenius": (rounded.norm() / expected.norm()).item(),
                                      "largest": rounded.abs().max().item()}
    return {"shape": asdict(shape), "input": kind, "rows_per_head": len(rows), "results": results}


def accuracy_section(bench):
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("normal", "large scores", "sink"):
            for dim in (64,) if bench.quick else (64, 128):
                for dtype in ("f16", "bf16", "f32"):
                    yield accuracy_case(bench, Shape(2048 if bench.quick else 16384, 4, dim, dtype, True), kind, folder)
