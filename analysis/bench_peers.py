#!/usr/bin/env python3
"""Stream-CQSA beside its peers, in turn on one GPU.

Sections, each with a result file of its own in the output directory, rewritten after every shape:

    kernel         one resident subproblem beside resident FlashAttention and cuDNN
    decomposition  the kernel's time, summed over the subproblems, at several c
    stream         host memory to host memory under 1 GiB beside resident attention and streamed peers
    sweep          the same problem under growing device budgets beside our own resident kernel
    accuracy       errors against fp64, of ours and of the peers, on the same input

The peers: flash2 and cudnn are torch's scaled_dot_product_attention with that backend pinned; flash3
(flash_attn_interface, which PyPI's tokenspeed-fa3 holds built), flash4 (flash_attn.cute), stream_cqsa (PyPI's
stream-cqsa, by the method's authors) and seqattn (built from github.com/renlililoli/stream-attn; PyPI's is
another) take part where they can be imported. A peer that fails is recorded with its message, and one that
has no result at all is listed as absent, with the reason.

Timed: rounds in turn, A B A B, after a round of warm-up; what counts is the median. Resident attention
is timed by device events and streamed attention by the wall clock, both on random input.
Exit status: 0 done, 1 our program failed somewhere, was wrong or, with an fp32 output, less exact than cuDNN, 2 wrong usage.
"""

import argparse
import datetime
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

from bench_sections import BUDGETS, SECTIONS, Bench, absent_peers
from bench_turns import first_gpu, without_folders
from peers import PEERS
from problem import Shape
import result_file


def output_of(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def conditions(bench):
    """Where and by what the numbers were taken."""
    torch = bench.torch
    device = output_of(["nvidia-smi", "-i", first_gpu(), "--query-gpu=name,driver_version,power.limit,memory.total",
                        "--format=csv,noheader"]).split(", ")
    version = output_of([*bench.launcher, bench.program, "--version"])
    return {"command": without_folders(shlex.join(["bench_peers.py", *sys.argv[1:]])),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "program": [" ".join(line.split()) for line in version.splitlines()],
            "device": dict(zip(("name", "driver", "power_limit", "memory"), device)),
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version()}


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
        values = [one["gpu"][key] for one in rounds if "gpu" in one]
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
    parser.add_argument("--peers", type=names(PEERS), default=PEERS, help="a,b,... (default: all)")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=BUDGETS,
                        help="of device memory in the sweep: a,b,... (default: all)")
    parser.add_argument("--peer-seconds", type=float, default=60, help="of each streamed peer (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few small shapes, one round: a trial, not a measurement")
    parser.add_argument("--backend", default="cuda", help="of our program (default: %(default)s)")
    parser.add_argument("--torch-device", default="cuda", help="of the peers (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments):
    options = parse_arguments(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    bench, tables, ok = Bench(options), [], True
    head = conditions(bench)
    for name in options.sections:
        rows, begin = [], time.monotonic()
        for row in SECTIONS[name](bench):
            rows.append(row)
            seconds = time.monotonic() - begin
            absent = absent_peers(name, options.peers, rows)
            result_file.write(options.output_dir / f"gpu_{name}.json",
                              {"section": name, **head, "seconds": seconds, "absent": absent, "rows": rows})
            tables.append(table(row))
            print(f"[{name}, {seconds:.0f} s] {tables[-1]}", flush=True)
            ok = ok and sound(row)
        for peer, reason in absent_peers(name, options.peers, rows).items():
            tables.append(f"absent from {name}: {peer}: {reason}")
    bench.monitor.close()
    print("\n" + "\n".join(tables))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
