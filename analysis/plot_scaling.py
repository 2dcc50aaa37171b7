#!/usr/bin/env python3
"""Speed-up, efficiency, stages and bytes per worker of a scaling study, as a table and a picture.

Reads JSON lines (scaling_runs.py says what is in them), prints a Markdown table and, with --output FILE.png,
draws speed-up and efficiency beside the ideal, the bytes that a worker takes in against N / sqrt(R), and the
busy share of each stage. Only the picture needs matplotlib.
Exit status: 0 done, 1 some output differs from the others of its problem or has no checksum, 2 wrong usage.
"""

import argparse
import importlib
import math
import pathlib
import statistics
import sys

from scaling_runs import BadInput, efficiency, output_verdict, read_runs, series, speed_up

COLOURS = ("#1f6fb4", "#e0913a", "#8fbc5a", "#b05b9c", "#444444", "#c04a3a", "#3aa6a0")
COLUMNS = ("run", "problem", "units", "seconds", "speed-up", "efficiency", "TFLOP/s", "compute", "bytes in, each",
           "over N/sqrt(R)", "master: merge", "other", "output")


def percent(share):
    return "" if share is None else f"{100 * share:.1f}%"


def bytes_over_ideal(run):
    """Bytes that a worker takes in over those of N / sqrt(R) tokens of Q, K and V. None where unknown."""
    taken = run.bytes_in()
    if not taken or not max(taken):
        return None
    return statistics.mean(taken) / (run.token_bytes() * run.shape.length / math.sqrt(run.units))


def row_of(run, base, runs):
    taken, over = run.bytes_in(), bytes_over_ideal(run)
    return (run.label, str(run.shape), f"{run.units}", f"{run.seconds:.3f}", f"{speed_up(run, base):.2f}",
            percent(efficiency(run, base)), f"{run.rate * 1e-12:.1f}", percent(run.stages().get("compute")),
            f"{statistics.mean(taken) * 1e-9:.3f} GB" if taken else "", f"{over:.2f}" if over else "",
            percent(run.master_share("merge")), percent(run.master_share("other")), output_verdict(run, runs))


def table(runs):
    """Markdown: a row a run, by label and count; the first of a label is its base."""
    rows = [row_of(run, of_label[0], runs) for of_label in series(runs).values() for run in of_label]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def outputs_line(runs):
    """One line on all outputs, and whether they are as promised."""
    verdicts = {output_verdict(run, runs) for run in runs}
    wrong = verdicts & {"DIFFERS", "no checksum"}
    if wrong:
        return f"Outputs: {' and '.join(sorted(wrong))}: the same problem and chunks must give the same bits.", False
    return "Outputs: the same checksum on every count of one problem and division.", True


def new_axes(axes, title, x, y):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def count_axis(axes, counts):
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def draw_scaling(axes, by_label):
    """Speed-up on axes[0] and efficiency on axes[1], the ideal dashed."""
    counts = sorted({run.units for of_label in by_label.values() for run in of_label})
    new_axes(axes[0], "Speed-up", "GPUs or workers", "times one")
    new_axes(axes[1], "Efficiency", "GPUs or workers", "of ideal")
    axes[0].plot(counts, counts, "--", color="#999999", label="ideal")
    axes[1].axhline(1, linestyle="--", color="#999999")
    for (label, of_label), colour in zip(by_label.items(), COLOURS * len(by_label)):
        units = [run.units for run in of_label]
        axes[0].plot(units, [speed_up(run, of_label[0]) for run in of_label], "o-", color=colour, label=label)
        axes[1].plot(units, [efficiency(run, of_label[0]) for run in of_label], "o-", color=colour)
    axes[0].set_yscale("log", base=2)
    axes[0].set_yticks(counts, [str(count) for count in counts])
    axes[0].minorticks_off()
    axes[1].set_ylim(0, max(1.1, axes[1].get_ylim()[1]))
    axes[0].legend(fontsize=7, frameon=False)
    for one in axes:
        count_axis(one, counts)


def draw_bytes(axes, by_label):
    """The bytes each worker takes in over those of N / sqrt(R) tokens; the dashed line has them equal."""
    new_axes(axes, "Taken in by a worker (mean, most)", "Q, K and V of N / sqrt(R) tokens, bytes", "bytes")
    limits = []
    for (_, of_label), colour in zip(by_label.items(), COLOURS * len(by_label)):
        points = [(run.token_bytes() * run.shape.length / math.sqrt(run.units), run.bytes_in())
                  for run in of_label if bytes_over_ideal(run)]
        if points:
            places, taken = zip(*points)
            axes.plot(places, [statistics.mean(one) for one in taken], "o-", color=colour)
            axes.plot(places, [max(one) for one in taken], "_", color=colour, markersize=12)
            limits += places
    if limits:
        axes.plot([min(limits), max(limits)], [min(limits), max(limits)], "--", color="#999999")
        axes.set_xscale("log")
        axes.set_yscale("log")


def stage_shares(run):
    """Stage of the workers or of the master -> busy share of the wall clock."""
    of_master = {f"master: {of}": run.master_share(of) for of in ("merge", "other")}
    return {**run.stages(), **{name: share for name, share in of_master.items() if share is not None}}


def draw_stages(axes, label, of_label, names):
    """A group of bars a count, a bar a stage; stages overlap, so the bars of a group need not sum to 1."""
    new_axes(axes, label, "GPUs or workers", "busy, of wall clock")
    width = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(of_label))]
        axes.bar(places, [stage_shares(run).get(name, 0) for run in of_label], width * 0.94,
                 color=f"C{index % 10}", label=name)
    axes.axhline(1, linestyle="--", color="#999999", linewidth=1)
    axes.set_xticks(range(len(of_label)), [str(run.units) for run in of_label])
    axes.set_ylim(0, 1.3 * max(1.0, axes.get_ylim()[1]))


def picture(pyplot, by_label):
    columns = max(3, math.ceil(len(by_label) / math.ceil(len(by_label) / 4)))
    rows = 1 + math.ceil(len(by_label) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.9 * rows), dpi=130, squeeze=False,
                                   layout="constrained")
    cells = list(grid.flat)
    draw_scaling(cells[:2], by_label)
    draw_bytes(cells[2], by_label)
    for cell in cells[3:columns] + cells[columns + len(by_label):]:
        cell.set_visible(False)
    names = list(dict.fromkeys(name for of_label in by_label.values() for run in of_label for name in stage_shares(run)))
    for cell, (label, of_label) in zip(cells[columns:], by_label.items()):
        draw_stages(cell, label, of_label, names)
    cells[columns].legend(fontsize=7, frameon=False, loc="upper center", ncols=3)
    return figure


def pyplot_or_none():
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="JSON lines")
    parser.add_argument("--output", type=pathlib.Path, help="the picture, .png")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.results)
        pyplot = pyplot_or_none() if options.output else None
        if options.output and pyplot is None:
            raise BadInput("--output: matplotlib is not installed; without --output the table needs none")
    except BadInput as error:
        print(f"plot_scaling: {error}", file=sys.stderr)
        return 2
    line, good = outputs_line(runs)
    print(f"{table(runs)}\n\n{line}")
    if pyplot:
        picture(pyplot, series(runs)).savefig(options.output)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
