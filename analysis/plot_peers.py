#!/usr/bin/env python3
"""Plots of bench_peers.py's results: kernel rates beside the peers', and throughput over the budget.

Reads gpu_kernel.json and gpu_sweep.json of a directory, whichever is there, and writes gpu_kernel.png
and gpu_sweep.png beside them. Exit status: 0 done, 2 neither is there.
"""

import argparse
import json
import pathlib
import statistics
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.ticker import FixedLocator, NullLocator  # noqa: E402

COLOURS = {"ours": "#1f6fb4", "flash2": "#c8c8c8", "cudnn": "#8fbc5a", "flash3": "#e0913a", "flash4": "#b05b9c"}
LABELS = {"ours": "Stream-CQSA", "flash2": "FlashAttention-2", "cudnn": "cuDNN", "flash3": "FlashAttention-3",
          "flash4": "FlashAttention-4"}
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def bytes_of(text):
    return int(text[:-3]) * UNITS[text[-3:]]


def subtitle(result):
    """What the numbers were taken on."""
    device = result["device"]
    parts = [device.get("name", ""), device.get("power_limit", ""), f"torch {result['torch']}",
             f"cuDNN {result['cudnn']}", result["date"][:10]]
    return ", ".join(part for part in parts if part)


def new_axes(title, result, size):
    figure, axes = plt.subplots(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes.set_title(subtitle(result), fontsize=8, color="#555555")
    axes.set_ylabel("TFLOP/s")
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_of(shape):
    """All that tells a shape from the others, in three lines; grouped heads as query heads/key and value heads."""
    heads = f"{shape['heads']}/{shape['kv_heads']}" if shape["kv_heads"] else shape["heads"]
    return (f"N={shape['length'] // 1024}K D={shape['dim']}\nH={heads} {shape['dtype']}\n"
            f"{'causal' if shape['causal'] else 'full'}")


def plot_kernel(result):
    """A group of bars a shape, a bar a competitor that ran."""
    rows = result["rows"]
    names = [name for name in LABELS
             if any("flop_per_second" in row["results"].get(name, {}) for row in rows)]
    figure, axes = new_axes("Resident attention, forward", result, (1.6 + 1.35 * len(rows), 4.2))
    width = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        rates = [row["results"].get(name, {}).get("flop_per_second", 0) * 1e-12 for row in rows]
        places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(rows))]
        bars = axes.bar(places, rates, width * 0.94, color=COLOURS[name], label=LABELS[name])
        axes.bar_label(bars, [f"{rate:.0f}" if rate else "" for rate in rates], fontsize=6, padding=1)
    axes.set_xticks(range(len(rows)), [label_of(row["shape"]) for row in rows], fontsize=8)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.legend(ncols=len(names), fontsize=8, frameon=False, loc="upper left")
    return figure


def plot_sweep(result):
    """Throughput from host memory to host memory over the device budget, and the resident kernel's."""
    rows = [row for row in result["rows"] if "flop_per_second" in row["results"]["streamed"]]
    shape = result["rows"][0]["shape"]
    title = (f"Host memory to host memory under a device budget: N={shape['length']} H={shape['heads']} "
             f"D={shape['dim']} {shape['dtype']} {'causal' if shape['causal'] else 'full'}")
    figure, axes = new_axes(title, result, (7.6, 4.2))
    budgets = [bytes_of(row["budget"]) for row in rows]
    rates = [row["results"]["streamed"]["flop_per_second"] * 1e-12 for row in rows]
    axes.plot(budgets, rates, "o-", color=COLOURS["ours"], label="streamed, wall clock")
    for row, budget, rate in zip(rows, budgets, rates):
        axes.annotate(f"c={row['results']['streamed']['c']}", (budget, rate), xytext=(0, -14),
                      textcoords="offset points", ha="center", fontsize=7, color="#555555")
    resident = [row["results"]["resident"]["flop_per_second"] * 1e-12 for row in rows
                if "flop_per_second" in row["results"]["resident"]]
    if resident:
        axes.axhline(statistics.median(resident), color="#444444", linestyle="--", linewidth=1,
                     label="all resident, kernel alone")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([row["budget"].replace("iB", " iB").replace("M ", " M").replace("G ", " G") for row in rows])
    axes.set_xlabel("device budget")
    axes.set_ylim(0, max(rates + resident, default=1) * 1.18)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    directory = parser.parse_args(arguments).directory
    found = False
    for name, plot in (("gpu_kernel", plot_kernel), ("gpu_sweep", plot_sweep)):
        path = directory / f"{name}.json"
        if path.exists():
            found = True
            plot(json.loads(path.read_text())).savefig(path.with_suffix(".png"))
    if not found:
        print(f"plot_peers: {directory}: neither gpu_kernel.json nor gpu_sweep.json; bench_peers.py writes them",
              file=sys.stderr)
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
