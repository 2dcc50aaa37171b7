"""Competitors that take turns: how a round is run, what is recorded of it, and who drops out.

A competitor has round() -> {"seconds" and/or "kernel_seconds", ...}, finish() -> what it says at the
end, and `key`, the time that is compared.
"""

import contextlib
import json
import os
import pty
import queue
import re
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict

ROUND_SECONDS = 300     # how long a round of ours may take, reading its input included


class Failure(Exception):
    """A competitor cannot go on; the message is one line."""


def without_folders(text):
    """The text with each absolute path cut down to its last name."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)*", "", text)


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, Failure) else type(error).__name__ + ": "
    return without_folders(kind + (lines or [""])[0])[:300]


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
                                        stderr=subprocess.PIPE, text=True, errors="replace")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            if line.startswith("{"):
                with contextlib.suppress(ValueError):  # a library's word may begin so too
                    self.answers.put(json.loads(line))
                    continue
            if line.strip():
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


def first_gpu():
    """The name by which nvidia-smi knows the device that programs here see as their first."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


class Monitor:
    """nvidia-smi's readings of the first GPU, ten a second, each with the time of its arrival."""

    def __init__(self):
        self.samples, self.process = [], None
        ours, its = pty.openpty()   # a terminal, so that each line comes as it is written
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", "-i", first_gpu(), "--query-gpu=clocks.sm,power.draw,temperature.gpu",
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
        """The median clock and the highest power and temperature of a span of time; {} without a reading in it."""
        inside = [s for s in list(self.samples) if begin <= s[0] <= end]
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
    result["rounds"].append({**answer, "warm_up": warm_up, **({"gpu": state} if state else {})})


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
