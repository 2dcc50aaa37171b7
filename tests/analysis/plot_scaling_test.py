"""Tests of analysis/plot_scaling.py on made-up runs with known answers."""

import contextlib
import importlib.util
import io
import json
import math
import pathlib
import sys
import tempfile
import unittest
import unittest.mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import plot_scaling as program  # noqa: E402  (needs the path above)
import scaling_runs  # noqa: E402


def record(units, seconds, label="strong", n=1 << 16, bits="abc", **more):
    """A run whose workers each take in the bytes of N / sqrt(R) tokens."""
    share = 3 * 2 * 64 * 2 * n / math.sqrt(units)
    return {"label": label, "ranks": units + 1, "workers": units, "gpus": units, "n": n, "heads": 2, "dim": 64,
            "dtype": "f16", "causal": False, "chunks": 7, "seconds": seconds, "checksum": bits,
            "stages": {"compute": {"busy_seconds": 0.75 * seconds * units, "operations": 7, "bytes": 0},
                       "spill": {"busy_seconds": 0, "operations": 0, "bytes": 0}},
            "master": {"busy_seconds_merge": 0.5 * seconds, "busy_seconds_other": 0.01 * seconds,
                       "wall_seconds": seconds},
            "workers_detail": [{"rank": 1 + i, "host": "a", "device": i, "bytes_read": 0, "bytes_copied_in": share,
                                "compute_seconds": 0.75 * seconds, "subproblems": 7 // units} for i in range(units)],
            **more}


class PlotScalingTest(unittest.TestCase):
    def run_program(self, records, *options):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "runs.jsonl")
            path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                status = program.main([str(path), *(option.replace("FOLDER", folder) for option in options)])
            picture = pathlib.Path(folder, "x.png")
            return status, out.getvalue(), errors.getvalue(), picture.read_bytes() if picture.exists() else b""

    def cells(self, text):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return [dict(zip(rows[0], row)) for row in rows[1:]]

    def test_ideal_strong_scaling(self):
        status, text, _, _ = self.run_program([record(units, 12 / units) for units in (4, 1, 2)])
        rows = self.cells(text)
        self.assertEqual(status, 0)
        self.assertEqual([row["units"] for row in rows], ["1", "2", "4"])
        self.assertEqual([row["speed-up"] for row in rows], ["1.00", "2.00", "4.00"])
        self.assertEqual({row["efficiency"] for row in rows}, {"100.0%"})
        self.assertEqual({row["over N/sqrt(R)"] for row in rows}, {"1.00"})
        self.assertEqual({(row["compute"], row["master: merge"], row["other"]) for row in rows},
                         {("75.0%", "50.0%", "1.0%")})
        self.assertEqual({row["output"] for row in rows}, {"same bits (3 runs)"})

    def test_half_the_speed_is_half_the_efficiency(self):
        rows = self.cells(self.run_program([record(1, 8), record(4, 4)])[1])
        self.assertEqual((rows[1]["speed-up"], rows[1]["efficiency"]), ("2.00", "50.0%"))

    def test_a_series_that_begins_at_two(self):
        rows = self.cells(self.run_program([record(2, 4), record(4, 2)])[1])
        self.assertEqual([row["speed-up"] for row in rows], ["2.00", "4.00"])

    def test_weak_scaling_counts_work(self):
        runs = [record(units, 5, "weak", n=int(4096 * math.sqrt(units)), bits=str(units)) for units in (1, 4, 16)]
        status, text, _, _ = self.run_program(runs)
        self.assertEqual(status, 0)
        self.assertEqual({row["efficiency"] for row in self.cells(text)}, {"100.0%"})
        self.assertEqual({row["output"] for row in self.cells(text)}, {"one run"})

    def test_repeats_count_by_their_median(self):
        runs = [record(1, 8)] + [record(2, seconds) for seconds in (100, 4, 1)]
        rows = self.cells(self.run_program(runs)[1])
        self.assertEqual([row["seconds"] for row in rows], ["8.000", "4.000"])
        self.assertEqual(rows[1]["output"], "same bits (4 runs)")

    def test_other_bits_fail(self):
        runs = [record(1, 8), record(2, 4), record(2, 5, "a worker killed", bits="abd")]
        status, text, _, _ = self.run_program(runs)
        self.assertEqual(status, 1)
        self.assertEqual({row["output"] for row in self.cells(text)}, {"DIFFERS"})
        self.assertIn("Outputs: DIFFERS", text)

    def test_no_checksum_fails(self):
        status, text, _, _ = self.run_program([record(1, 8, bits=None), record(2, 4)])
        self.assertEqual(status, 1)
        self.assertIn("Outputs: no checksum", text)

    def test_other_chunks_need_not_have_the_same_bits(self):
        self.assertEqual(self.run_program([record(1, 8), record(2, 4, bits="x", chunks=13)])[0], 0)

    def test_what_is_no_run_is_one_line(self):
        lacking = {key: value for key, value in record(1, 8).items() if key != "chunks"}
        for line, words in (("{", "runs.jsonl:1: not JSON"), (lacking, "lacks 'chunks'"), ("[]", "lacks 'label'"),
                            (record(1, math.nan), "seconds is nan"), (record(1, 0), "seconds is 0"),
                            (record(1, 1, dtype="f8"), "dtype 'f8'"), ("", "no runs")):
            with self.subTest(words=words):
                status, text, errors, _ = self.run_program([line])
                self.assertEqual((status, text, errors.count("\n")), (2, "", 1))
                self.assertIn(words, errors)

    def test_the_table_needs_no_matplotlib(self):
        with unittest.mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.pyplot": None}):
            self.assertEqual(self.run_program([record(1, 8)])[0], 0)
            status, _, errors, _ = self.run_program([record(1, 8)], "--output", "FOLDER/x.png")
        self.assertEqual((status, errors.count("\n")), (2, 1))
        self.assertIn("matplotlib is not installed", errors)

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "needs matplotlib")
    def test_the_picture(self):
        bare = {"stages": {}, "master": {}, "workers_detail": []}
        for labels in (1, 2, 5):
            runs = [record(units, 8 / units, f"run {label}", **(bare if label == 1 else {}))
                    for label in range(labels) for units in (1, 2, 4)]
            status, _, _, picture = self.run_program(runs, "--output", "FOLDER/x.png")
            self.assertEqual((status, picture[:4]), (0, b"\x89PNG"))

    def test_units_are_workers_where_there_is_no_gpu(self):
        for gpus, workers, units in ((0, 3, 3), (4, 4, 4), (0, 0, 1)):
            run = scaling_runs.Run({**record(1, 1), "gpus": gpus, "workers": workers})
            self.assertEqual(run.units, units)


if __name__ == "__main__":
    unittest.main()
