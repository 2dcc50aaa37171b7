"""Tests of analysis/simulate.py and its modules on cases that have an answer by hand."""

import contextlib
import io
import json
import math
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import simulate as program  # noqa: E402  (needs the path above)
import simulated_divisions as divisions  # noqa: E402
from problem import Shape  # noqa: E402
from simulation import Costs, Simulation, simulate_ring  # noqa: E402

N, H, D, ITEM = 4096, 4, 64, 2
FULL, CAUSAL = (Shape(N, H, D, "f16", causal) for causal in (False, True))
TENSOR = N * H * D * ITEM   # bytes of Q, and of K, V and O
FREE = {name: 0 for name in ("launch_seconds", "copy_in_bytes_per_second", "copy_out_bytes_per_second",
                             "send_bytes_per_second", "receive_bytes_per_second", "message_seconds",
                             "dispatch_seconds", "merge_bytes_per_second", "merge_bytes_per_second_all",
                             "write_bytes_per_second", "kernel_flop_per_second")}


def free_but(**costs):
    """Costs where nothing takes time but what is given."""
    return Costs(**{**FREE, **costs})


def run(shape, tasks, workers, alone=None, **costs):
    return Simulation(shape, tasks, workers, free_but(**costs), alone).run()


class DivisionsTest(unittest.TestCase):
    def test_covers_cover(self):
        for c in [*range(1, 160), 307, 553, 1000]:
            cover = divisions.difference_cover(c)
            self.assertEqual({(b - a) % c for a in cover for b in cover}, set(range(c)), c)
            self.assertTrue(len(cover) <= max(2, 1.35 * math.sqrt(c) + 1), c)

    def test_perfect_covers(self):
        for least, c in ((1, 1), (2, 3), (4, 7), (8, 13), (14, 31), (300, 307), (10000, 10303), (30000, 19461)):
            self.assertEqual(divisions.perfect_count(least), c)
            if 1 < c < 1000:
                self.assertEqual(len(divisions.difference_cover(c)), (1 + math.isqrt(4 * c - 3)) // 2)

    def test_each_pair_of_chunks_has_one_quorum(self):
        for c in range(1, 32):
            chosen = divisions.responsibilities(divisions.difference_cover(c), c)
            self.assertEqual(set(chosen), set(range(c)))
            pairs = [((i + a) % c, (i + b) % c) for i in range(c) for a, b in chosen.values()]
            self.assertEqual(len(set(pairs)), c * c)

    def test_all_work_and_no_more(self):
        for shape in (FULL, CAUSAL):
            for c, groups in ((1, 1), (2, 4), (7, 2), (12, 1), (13, 4)):
                flops = sum(task.flops for task in divisions.quorum_tasks(shape, c, groups))
                self.assertTrue(abs(flops / shape.flops() - 1) <= 2 / N, (c, groups))
            tiles = divisions.tile_tasks(shape, 12, 3)
            self.assertTrue(abs(sum(task.flops for task in tiles) / shape.flops() - 1) <= 2 / N)

    def test_the_worked_example(self):
        task = divisions.quorum_tasks(CAUSAL, 7, 1, cover=[0, 1, 3])[2]  # holds 2, 3, 5; causal: (2,2) (3,2) (5,2) (5,3)
        self.assertEqual(task.rows, (2, 3, 5))
        self.assertEqual(set(task.blocks), {4, 6, 10, 5, 7})
        self.assertTrue(math.isclose(task.flops, 4 * D * H * (N / 7) ** 2 * 3.5))
        self.assertTrue(math.isclose(task.partial_bytes, 3 * N / 7 * H * (D + 2) * 4))

    def test_what_a_causal_mask_keeps(self):
        for queries, keys in (((0, 9), (0, 9)), ((5, 9), (0, 9)), ((0, 4), (4, 9)), ((3, 7), (4, 12))):
            by_hand = sum(key <= query for query in range(*queries) for key in range(*keys))
            self.assertEqual(divisions.kept(queries, keys), by_hand)


class SimulationTest(unittest.TestCase):
    def test_one_worker_is_the_sum_of_its_work(self):
        for shape in (FULL, CAUSAL):
            tasks = divisions.quorum_tasks(shape, 7, 2)
            outcome = run(shape, tasks, 1, kernel_flop_per_second=1e9)
            expected = sum(task.flops for task in tasks) / 1e9
            self.assertTrue(math.isclose(outcome.seconds, expected, rel_tol=1e-9))
            self.assertTrue(math.isclose(outcome.compute_seconds, expected, rel_tol=1e-9))
            self.assertTrue(math.isclose(outcome.bytes_in[0], 3 * TENSOR))
            self.assertEqual(outcome.bytes_out, 0)

    def test_free_transfers_balance(self):
        for shape, c in ((FULL, 12), (CAUSAL, 13)):  # odd c: each subproblem of a causal mask is alike
            for workers in (1, 2, c, 4 * c):
                tasks = divisions.quorum_tasks(shape, c, H)
                seconds = run(shape, tasks, workers, kernel_flop_per_second=1e9).seconds
                most = math.ceil(c * H / workers)
                self.assertTrue(math.isclose(seconds, most * tasks[0].flops / 1e9, rel_tol=1e-9), (c, workers))

    def test_loading_hides_behind_computing_but_for_the_first(self):
        tasks = divisions.quorum_tasks(FULL, 1, H)
        load, compute = 3 * TENSOR / H / 1e6, FULL.flops() / H / 1e9
        slow_kernel = run(FULL, tasks, 1, kernel_flop_per_second=1e9, copy_in_bytes_per_second=1e6)
        self.assertTrue(load < compute)
        self.assertTrue(math.isclose(slow_kernel.seconds, load + H * compute))
        slow_copy = run(FULL, tasks, 1, kernel_flop_per_second=1e12, copy_in_bytes_per_second=1e6)
        self.assertTrue(math.isclose(slow_copy.seconds, H * load + compute / 1000))

    def test_a_small_cache_loads_again(self):
        tasks = divisions.quorum_tasks(FULL, 7, 1)
        every = sum(task.block_bytes[block] for task in tasks for block in task.blocks)
        kept, dropped = (run(FULL, tasks, 1, device_cache_bytes=size).bytes_in[0] for size in (1e12, 0))
        self.assertTrue(math.isclose(kept, 3 * TENSOR))
        self.assertTrue(kept < dropped <= every)

    def test_a_slow_master_sets_the_time(self):
        tasks = divisions.quorum_tasks(FULL, 13, H)
        partials = sum(task.partial_bytes for task in tasks)
        for costs in ({"receive_bytes_per_second": 1e6}, {"merge_bytes_per_second": 1e6, "merge_threads": 1},
                      {"merge_bytes_per_second": 1e6, "merge_threads": 4, "merge_bytes_per_second_all": 1e6}):
            outcome = run(FULL, tasks, 8, kernel_flop_per_second=1e15, **costs)
            self.assertTrue(abs(outcome.seconds / (partials / 1e6) - 1) <= 0.01, costs)
            self.assertTrue(math.isclose(outcome.bytes_out, partials))
            shared = run(FULL, tasks, 8, kernel_flop_per_second=1e15, mergers=4, **costs)
            self.assertTrue(abs(shared.seconds / outcome.seconds - 0.25) <= 0.02, costs)
        outcome = run(FULL, tasks, 8, kernel_flop_per_second=1e15, dispatch_seconds=0.5)
        self.assertTrue(abs(outcome.seconds / (0.5 * len(tasks)) - 1) <= 0.01)

    def test_whole_head_groups_send_finished_rows(self):
        for workers in (2, 3, H):
            tasks = divisions.group_tasks(FULL, 7, H, workers)
            self.assertTrue(math.isclose(sum(task.flops for task in tasks), FULL.flops()))
            self.assertEqual(sorted(row for task in tasks for row in task.rows), list(range(7 * H)))
            outcome = run(FULL, tasks, workers, kernel_flop_per_second=1e9, merge_bytes_per_second=1,
                          merge_threads=1, merge_bytes_per_second_all=1)
            expected = math.ceil(H / workers) * FULL.flops() / H / 1e9
            self.assertTrue(math.isclose(outcome.seconds, expected, rel_tol=1e-9), workers)
            self.assertEqual(outcome.merge_seconds, 0)
            self.assertTrue(math.isclose(outcome.bytes_out, TENSOR))
        for groups, workers, shared in ((8, 1, False), (8, 2, True), (8, 8, True), (8, 5, True), (8, 6, False),
                                        (1, 2, False), (4, 8, False)):
            self.assertEqual(divisions.shares_by_groups(groups, workers), shared, (groups, workers))

    def test_outputs_are_written_once(self):
        tasks = divisions.quorum_tasks(FULL, 7, H)
        for workers in (1, 5):
            seconds = run(FULL, tasks, workers, write_bytes_per_second=1e6).seconds
            self.assertTrue(math.isclose(seconds, TENSOR / 1e6, rel_tol=1e-9))

    def test_one_worker_of_a_master_sends(self):
        tasks = divisions.quorum_tasks(FULL, 7, H)
        self.assertTrue(run(FULL, tasks, 1, alone=False, receive_bytes_per_second=1e6).seconds > 1)
        self.assertEqual(run(FULL, tasks, 1, alone=True, receive_bytes_per_second=1e6).seconds, 0)

    def test_tiles(self):
        one_head = Shape(N, 1, D, "f16", False)
        tasks = divisions.tile_tasks(one_head, 4, 2)
        outcome = run(one_head, tasks, 4, kernel_flop_per_second=1e9)
        self.assertTrue(math.isclose(outcome.seconds, one_head.flops() / 4 / 1e9))
        self.assertTrue(math.isclose(outcome.bytes_in[0], 3 * TENSOR / H / 2))
        self.assertTrue(math.isclose(outcome.bytes_out, 2 * N * (D + 2) * 4))

    def test_ring(self):
        one_head = Shape(N, 1, D, "f16", False)
        fast_link = simulate_ring(one_head, 8, free_but(kernel_flop_per_second=1e9))
        self.assertTrue(math.isclose(fast_link.seconds, one_head.flops() / 8 / 1e9))
        self.assertTrue(math.isclose(fast_link.bytes_in[0], TENSOR / H * (3 / 8 + 2 * 7 / 8)))
        slow_link = simulate_ring(one_head, 8, free_but(send_bytes_per_second=1e6))
        self.assertTrue(math.isclose(slow_link.seconds, 7 * (2 * TENSOR / H / 8) / 1e6))

    def test_workers_that_share_cores_gain_nothing(self):
        tasks = divisions.quorum_tasks(FULL, 12, H)
        one, four = (run(FULL, tasks, workers, shared_flop_per_second=1e9).seconds for workers in (1, 4))
        self.assertTrue(math.isclose(one, four, rel_tol=1e-9))


def measured(units, seconds, **more):
    """A run's line; 7 chunks, 4 head groups."""
    return {"label": "x", "ranks": units + (units > 1), "workers": units, "n": N, "heads": H, "dim": D,
            "dtype": "f16", "causal": True, "chunks": 7, "seconds": seconds, "checksum": "1",
            "workers_detail": [{"subproblems": 28 / units}] * units, **more}


class ProgramTest(unittest.TestCase):
    def run_program(self, *options, **files):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                pathlib.Path(folder, name).write_text(text)
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                status = program.main([option.replace("FOLDER", folder) for option in options])
            return status, out.getvalue(), errors.getvalue()

    def check(self, runs, *options, costs=free_but(kernel_flop_per_second=1e9)):
        return self.run_program("--check", "FOLDER/runs", "--costs", "FOLDER/costs", *options,
                                runs="\n".join(map(json.dumps, runs)), costs=json.dumps(vars(costs)))

    def test_predictions_are_compared(self):
        flops = sum(task.flops for task in divisions.quorum_tasks(CAUSAL, 7, 4))
        exact = [measured(units, math.ceil(28 / units) / 28 * flops / 1e9) for units in (1, 2, 8)]
        status, text, _ = self.check(exact)
        self.assertEqual((status, text.count("+0.0%") + text.count("-0.0%")), (0, 3))
        exact[1]["seconds"] /= 1.3
        status, text, _ = self.check(exact)
        self.assertEqual(status, 1)
        self.assertIn("+30.0%", text)
        self.assertIn("BEYOND 15%", text)

    def test_the_smallest_run_gives_its_rates(self):
        flops = CAUSAL.flops()
        stages = {"compute": {"busy_seconds": flops / 2e9, "operations": 28, "bytes": 0}}
        runs = [measured(1, flops / 2e9, stages=stages), measured(2, flops / 4e9)]
        status, text, _ = self.check(runs, "--calibrate")
        self.assertEqual(status, 0)
        self.assertIn("gave the costs", text)

    def test_a_sweep_has_all_divisions(self):
        status, text, _ = self.run_program("--length", "65536", "--heads", "1", "--causal", "--workers", "1,6,40")
        rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][1:]
        self.assertEqual(status, 0)
        self.assertEqual([row[1] for row in rows], ["cqs", "tiles", "ring"] * 3)

    def test_costs_of_a_bench(self):
        bench = {"copy": {"memcpy_bytes_per_second": 8e9}, "kernel": {"rates": [
            {"head_dim": 64, "mask": "full", "flop_per_second": 1e11},
            {"head_dim": 64, "mask": "causal", "flop_per_second": 9e10}]},
            "merge": {"threads": 2, "rates": [{"head_dim": 64, "partial_bytes_per_second": 1e10}]}}
        status, text, _ = self.run_program("--bench", "FOLDER/bench", "--print-costs", bench=json.dumps(bench))
        costs = json.loads(text)
        self.assertEqual(status, 0)
        self.assertEqual((costs["kernel_flop_per_second"], costs["copy_in_bytes_per_second"],
                          costs["merge_bytes_per_second"], costs["merge_threads"]), (1e11, 8e9, 5e9, 2))

    def test_bad_input_is_one_line(self):
        for costs, words in (('{"speed": 1}', "'speed' is not known"), ('{"dispatch_seconds": -1}', "is -1"),
                             ("[]", "not a JSON object"), ("{", "cannot be read")):
            status, text, errors = self.run_program("--costs", "FOLDER/costs", costs=costs)
            self.assertEqual((status, text, errors.count("\n")), (2, "", 1))
            self.assertIn(words, errors)
        status, _, errors = self.run_program("--check", "FOLDER/none")
        self.assertEqual((status, errors.count("\n")), (2, 1))


if __name__ == "__main__":
    unittest.main()
