"""Tests of analysis/bench_peers.py and its modules with a made-up program and made-up peers; no GPU and no torch."""

import contextlib
import importlib.util
import io
import json
import math
import pathlib
import stat
import sys
import tempfile
import types
import unittest
import unittest.mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import bench_accuracy  # noqa: E402  (needs the path above)
import bench_peers as program  # noqa: E402
import bench_sections  # noqa: E402
import bench_turns  # noqa: E402
import peers  # noqa: E402
from bench_turns import Failure  # noqa: E402
from problem import Shape  # noqa: E402

# Answers each line with a time that its --chunks and the number of the round decide.
FAKE_PROGRAM = f"""#!{sys.executable}
import json, sys
if sys.argv[1] == "--version":
    print("stream-cqsa 1.2.3")
    sys.exit(0)
chunks = int(sys.argv[sys.argv.index("--chunks") + 1])
if chunks == 31:
    sys.exit("stream-cqsa: /some/where/input: too large")
for number, _ in enumerate(sys.stdin):
    print("a word", file=sys.stderr)
    seconds = 100 if number == 0 else chunks + number
    print(json.dumps({{"kernel_seconds": seconds, "seconds": 2 * seconds}}), file=sys.stderr, flush=True)
print(json.dumps({{"stream": {{"c": chunks, "head_groups": 8, "subproblems": chunks, "device_memory": {{"planned": 7}},
                  "host_memory": {{"planned": 8}}, "verification": {{"ok": True, "compared": 8}}}}}}))
"""


class NoMonitor:
    def between(self, begin, end):
        return {}


class Listed:
    """A competitor with given times; an exception among them is raised."""
    key = "seconds"

    def __init__(self, name, times, order, verification=None):
        self.name, self.times, self.order = name, iter(times), order
        self.verification = verification or {"ok": True}

    def round(self):
        self.order.append(self.name)
        time = next(self.times)
        if isinstance(time, Exception):
            raise time
        return {"seconds": time}

    def finish(self):
        return {"verification": self.verification}


class ArithmeticTest(unittest.TestCase):
    def test_flops_count_the_kept_scores(self):
        for causal in (False, True):
            shape = Shape(13, 3, 64, "f16", causal)
            kept = sum(not causal or j <= i for i in range(13) for j in range(13))
            self.assertEqual(shape.flops(), 4 * 64 * 3 * kept)

    def test_folders_are_cut_from_text(self):
        cases = {"mpirun -n 1 /a/b/stream-cqsa --x=/c/d.json": "mpirun -n 1 stream-cqsa --x=d.json",
                 "500 TFLOP/s, build/x": "500 TFLOP/s, build/x", "'/a/b': no": "'b': no"}
        for text, expected in cases.items():
            self.assertEqual(bench_turns.without_folders(text), expected)

    def test_only_a_small_error_is_right(self):
        for error, ok in ((0.001, True), (0.1, False), (math.nan, False), (math.inf, False)):
            result = peers.verified(error)
            self.assertEqual(result["ok"], ok)
            json.dumps(result, allow_nan=False)

    def test_inputs_are_what_their_names_say(self):
        for dim in (64, 128):
            shape = Shape(512, 2, dim, "f16", True)
            scores = {kind: np.einsum("bqhd,bkhd->hqk", *bench_accuracy.accuracy_input(shape, kind)[:2]) * dim ** -0.5
                      for kind in ("normal", "large scores", "sink")}
            self.assertTrue(0.9 <= scores["normal"].std() <= 1.1)
            self.assertTrue(np.allclose(scores["large scores"], 64 * scores["normal"], rtol=1e-4, atol=1e-2))
            lead = scores["sink"][:, :, 0].mean() - scores["sink"][:, :, 1:].mean()
            self.assertTrue(11 <= lead <= 13, lead)


class AccuracyTest(unittest.TestCase):
    def judge(self, first, second, cudnn=None):
        row = {"ours c=1": first, "ours c=7": second, "ours c=7 f16": {"relative_frobenius": 9, "largest": 9}}
        if cudnn is not None:
            row["cudnn"] = cudnn
        results = {name: dict(one) if isinstance(one, dict) else {"relative_frobenius": one, "largest": 1}
                   for name, one in row.items()}
        bench_accuracy.mark_less_exact(results)
        whole = {"shape": vars(Shape(8, 1, 64, "f16", True)), "input": "normal", "results": results}
        return program.sound(whole), program.table(whole)

    def test_ours_fails_where_it_is_less_exact_than_cudnn(self):
        self.assertTrue(self.judge(1e-4, 2e-4, 2e-4)[0])
        for wrong in (2.1e-4, 1.0, math.inf, math.nan):
            for pair in ((1e-4, wrong), (wrong, 1e-4)):
                ok, text = self.judge(*pair, 2e-4)
                self.assertFalse(ok)
                self.assertIn("less exact than cuDNN", text)

    def test_without_a_result_of_cudnn_there_is_nothing_to_compare(self):
        self.assertTrue(self.judge(1e-4, 1.0)[0])
        self.assertTrue(self.judge(1e-4, 1.0, {"error": "no backend"})[0])

    def test_our_own_failure_keeps_its_message(self):
        ok, text = self.judge({"error": "no memory"}, 1e-4, 2e-4)
        self.assertFalse(ok)
        self.assertIn("no memory", text)


class TurnsTest(unittest.TestCase):
    def run_turns(self, competitors, rounds):
        return bench_turns.take_turns({c.name: lambda c=c: c for c in competitors}, rounds, NoMonitor())

    def test_in_turn_without_the_warm_up(self):
        order = []
        results = self.run_turns([Listed("a", [100, 3, 1, 2], order), Listed("b", [100, 5, 6, 40], order)], 3)
        self.assertEqual("".join(order), "abababab")
        self.assertEqual((results["a"]["seconds"], results["b"]["seconds"]), (2, 6))
        row = bench_turns.compare(Shape(8, 1, 64, "f16", False), "a", results)
        self.assertEqual(row["results"]["b"]["over_base"], 3)
        self.assertEqual(row["results"]["a"]["flop_per_second"], 4 * 64 * 64 / 2)

    def test_who_fails_drops_out_and_keeps_what_it_has(self):
        order = []
        failing = Listed("a", [1, 2, Failure("no /x/y memory\nmore")], order)
        results = self.run_turns([failing, Listed("b", [1, 2, 3, 4], order)], 3)
        self.assertEqual("".join(order), "ababab" + "b")
        self.assertEqual((results["a"]["error"], results["a"]["seconds"]), ("no y memory", 2))
        self.assertEqual(results["b"]["seconds"], 3)

    def test_a_wrong_result_has_no_time(self):
        wrong = Listed("ours", [1, 2], [], {"ok": False})
        results = self.run_turns([wrong], 1)
        self.assertNotIn("seconds", results["ours"])
        self.assertFalse(program.sound({"results": results}))
        program.table(bench_turns.compare(Shape(8, 1, 64, "f16", False), "ours", results))

    def test_a_peer_that_is_not_there_is_recorded(self):
        def missing():
            raise ModuleNotFoundError("No module named 'peer'")
        results = bench_turns.take_turns({"peer": missing, "ours": lambda: Listed("ours", [1, 2], [])}, 1, NoMonitor())
        self.assertIn("No module named 'peer'", results["peer"]["error"])
        self.assertTrue(program.sound({"results": results}))


    def test_absent_peers_are_listed_with_the_reason(self):
        late = {"rounds": [], "timed": "seconds", "seconds": 2, "error": "the time limit ended this round"}
        rows = [{"results": {"ours": {}, "flash2": {"rounds": [], "error": "no backend"}, "cudnn": late}},
                {"results": {"flash2": {"rounds": [], "timed": "seconds", "error": "no backend"}, "cudnn": {}}}]
        absent = bench_sections.absent_peers("stream", ("flash2", "cudnn", "stream_cqsa"), rows)
        left_out = {name: "not in --peers" for name in ("flash3", "flash4", "seqattn 1GiB")}
        self.assertEqual(absent, {"flash2": "no backend", **left_out})
        self.assertEqual(bench_sections.absent_peers("sweep", (), rows), {})


class HostTensor(np.ndarray):
    """What the streamed peers' adapters use of a torch tensor."""

    def transpose(self, first, second):
        return self.swapaxes(first, second)

    def pin_memory(self):
        return self


def attend(q, k, v, causal):
    """Attention of [H, N, D] by its definition; a causal mask is aligned at the last query and the last key."""
    scores = np.einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores[:, ~np.tri(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdims=True), v)


class MadeUpStreamCqsa(types.ModuleType):
    """stream_cqsa 2.2.3's attention(), as far as its signature and layout go."""
    __version__ = "2.2.3"

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
                  verbose=None, hardware=None, kernel="auto", plan_only=False, return_plan=False, return_info=False,
                  **overrides):
        self.overrides = overrides
        output = np.stack([attend(*one, is_causal) for one in zip(q, k, v)]).view(HostTensor)
        return (output, {"engine": "classic", "itr": 1, "c": 7}) if return_info else output

    def kernels_available(self):
        return {"triton": True}


class MadeUpSeqattn(types.ModuleType):
    """seqattn's plan and runner: tensors [tokens, heads, dim], sequences by their bounds."""
    pairs = 0  # of a query and a key that were read

    def StreamingAttentionConfig(self, *, workspace_budget_bytes=None, block_m=None, block_n=None, num_warps=None,
                                 num_stages=None):
        return types.SimpleNamespace(workspace_budget_bytes=workspace_budget_bytes)

    def build_plan(self, *, q_heads, kv_heads, head_dim, dtype, device, max_q_tokens, max_kv_tokens, config):
        return types.SimpleNamespace(q_chunk_tokens=max_q_tokens, kv_chunk_tokens=4096)

    def StreamingAttentionRunner(self, plan, config=None):
        def run(q, k, v, bounds_q, bounds_k, *, softmax_scale=None, causal=False, out=None, stats=None):
            assert (list(bounds_q), list(bounds_k)) == ([0, len(q)], [0, len(k)])
            self.pairs += len(q) * len(k)
            out[:] = attend(*(x.swapaxes(0, 1) for x in (q, k, v)), causal).swapaxes(0, 1)
            return out
        self.budget, run.plan = config.workspace_budget_bytes, plan
        return run


class StreamedPeersTest(unittest.TestCase):
    def put_module(self, name, module):
        before = sys.modules.get(name)
        sys.modules[name] = module
        self.addCleanup(lambda: sys.modules.update({name: before}) if before else sys.modules.pop(name))
        return module

    def output_of(self, entry, causal, length=9):
        shape = Shape(length, 2, 4, "f16", causal)
        rng = np.random.default_rng(20611)
        q, k, v = (rng.standard_normal((1, length, 2, 4)).view(HostTensor) for _ in range(3))
        torch = types.SimpleNamespace(
            empty_like=np.empty_like, int32=np.int32, tensor=np.array,
            cuda=types.SimpleNamespace(get_device_properties=lambda _: types.SimpleNamespace(total_memory=1 << 40),
                                       set_per_process_memory_fraction=lambda _: None, empty_cache=lambda: None))
        options = peers.STREAMED_PEERS[entry]
        call, _ = peers.OPEN[options["package"]](torch, shape, q, k, v, json.loads(json.dumps(options)))
        expected = attend(*(x[0].swapaxes(0, 1) for x in (q, k, v)), causal).swapaxes(0, 1)
        self.assertTrue(np.allclose(call()[0][0], expected, rtol=1e-12))

    def test_adapters_call_and_turn_round(self):
        package = self.put_module("stream_cqsa", MadeUpStreamCqsa("stream_cqsa"))
        seqattn = self.put_module("seqattn", MadeUpSeqattn("seqattn"))
        for entry in peers.STREAMED_PEERS:
            for causal in (False, True):
                self.output_of(entry, causal)
        self.assertEqual(seqattn.budget, 1 << 30)
        self.output_of("stream_cqsa no limit", True)
        self.assertEqual(package.overrides["interest_set"], (0, 1, 3))

    def test_seqattn_reads_about_half_of_the_pairs_of_a_causal_problem(self):
        seqattn = self.put_module("seqattn", MadeUpSeqattn("seqattn"))
        with unittest.mock.patch.object(peers, "fastest_launch", lambda attend: {}):
            for causal, share in ((False, 1), (True, (1 + 1 / peers.SEQATTN_BLOCKS) / 2)):
                seqattn.pairs = 0
                self.output_of("seqattn 1GiB", causal, 64)
                self.assertEqual(seqattn.pairs, share * 64 ** 2)

    def test_the_fastest_launch_is_taken_without_its_compilation(self):
        now, compiled = [0], set()

        def attend(launch):
            tile = launch.get("block_m", 64) * launch.get("block_n", 64)
            if tile == 128 * 128:
                raise RuntimeError("out of resource: shared memory")
            seconds = 1000 / tile + launch.get("num_warps", 0)
            now[0] += seconds if str(launch) in compiled else 100 * tile
            compiled.add(str(launch))
        with unittest.mock.patch.object(peers.time, "perf_counter", lambda: now[0]):
            launch = peers.fastest_launch(attend)
        self.assertEqual(launch, {})
        with unittest.mock.patch.object(peers.time, "perf_counter", lambda: now[0]):
            launch = peers.fastest_launch(lambda launch: attend({**launch, "num_warps": 0}))
        self.assertEqual((launch["block_m"], launch["block_n"]), (128, 64))

    def test_no_launch_that_runs_leaves_the_packages_own(self):
        def fail(_):
            raise RuntimeError("no GPU")
        self.assertEqual(peers.fastest_launch(fail), {})

    def test_another_package_of_the_name_is_told_apart(self):
        self.put_module("seqattn", types.ModuleType("seqattn"))
        with self.assertRaisesRegex(Failure, "another package"):
            peers.seqattn_package()

    def test_a_package_that_does_not_import_is_the_reason(self):
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "torch.py").write_text("raise ImportError('no torch here')")
            with unittest.mock.patch.dict("os.environ", PYTHONPATH=folder):
                child = peers.streamed_child(Shape(8, 1, 4, "f16", False), peers.STREAMED_PEERS["seqattn 1GiB"], 60)
            self.addCleanup(child.process.kill)
            with self.assertRaisesRegex(Failure, "no torch here"):
                child.round()


class MonitorTest(unittest.TestCase):
    def monitor(self, *samples):
        with unittest.mock.patch.object(bench_turns.subprocess, "Popen", side_effect=OSError):
            monitor = bench_turns.Monitor()
        monitor.samples.extend(samples)
        return monitor

    def test_what_a_round_is_given_was_read_in_it(self):
        monitor = self.monitor((0.9, 100, 10, 1), (1.0, 1500, 600, 50), (1.1, 1700, 650, 60), (1.2, 1400, 640, 61),
                               (1.3, 200, 900, 90))
        self.assertEqual(monitor.between(1.0, 1.25), {"sm_clock_mhz": 1500, "power_watts": 650,
                                                      "temperature_celsius": 61, "samples": 3})

    def test_a_round_without_a_reading_is_given_none(self):
        monitor = self.monitor((1.0, 1500, 600, 50), (1.1, 1700, 650, 60))
        for begin, end in ((1.01, 1.09), (1.11, 1.15), (0.5, 0.99)):
            self.assertEqual(monitor.between(begin, end), {})
        self.assertEqual(self.monitor().between(0, 2), {})

    def test_only_rounds_with_a_reading_have_one(self):
        readings = unittest.mock.Mock(between=unittest.mock.Mock(side_effect=[{}, {"sm_clock_mhz": 1500.0,
                                                                                   "power_watts": 600.0}, {}]))
        results = bench_turns.take_turns({"ours": lambda: Listed("ours", [9, 1, 2], [])}, 2, readings)
        self.assertEqual([one.get("gpu", {}).get("power_watts") for one in results["ours"]["rounds"]],
                         [None, 600.0, None])
        row = bench_turns.compare(Shape(8, 1, 64, "f16", False), "ours", results)
        self.assertIn("1500 MHz    600 W", program.table(row))


class ChildTest(unittest.TestCase):
    def child(self, code, seconds=None):
        child = bench_turns.Child([sys.executable, "-c", code], "seconds", seconds)
        self.addCleanup(child.process.kill)
        return child

    def test_the_last_word_of_a_child_is_its_error(self):
        child = self.child("import sys; print('x: no GPU', file=sys.stderr); sys.exit(1)")
        with self.assertRaisesRegex(Failure, "^x: no GPU$"):
            child.round()

    def test_our_error_is_found_before_a_launchers(self):
        child = self.child("import sys; sys.exit('stream-cqsa: bad input\\nlauncher: a process failed')")
        with self.assertRaisesRegex(Failure, "^stream-cqsa: bad input$"):
            child.round()

    def test_a_word_that_looks_like_an_answer_is_kept(self):
        words = r"sys.stderr.buffer.write(b'{x} = \xff\n{no JSON}\n'); "
        child = self.child("import sys; sys.stdin.readline(); " + words + """print('{"seconds": 2}', file=sys.stderr)""", 60)
        self.assertEqual(child.round(), {"seconds": 2})
        self.assertEqual(child.said, ["{x} = \ufffd", "{no JSON}"])
        with self.assertRaisesRegex(Failure, "^{no JSON}$"):
            child.round()

    def test_a_child_that_never_answers_is_ended(self):
        child = self.child("import sys; sys.stdin.read()", seconds=0.5)
        with self.assertRaisesRegex(Failure, "time limit"):
            child.round()
        self.assertIsNotNone(child.process.returncode)


@unittest.skipUnless(importlib.util.find_spec("matplotlib"), "needs matplotlib")
class PlotTest(unittest.TestCase):
    def test_no_two_shapes_have_one_label(self):
        label_of = importlib.import_module("plot_peers").label_of
        shapes = [vars(shape) for shape in bench_sections.KERNEL_SHAPES]
        self.assertEqual(len({label_of(shape) for shape in shapes}), len(shapes))
        self.assertIn("H=32/8 bf16", label_of(vars(Shape(131072, 32, 128, "bf16", True, 8))))


class ProgramTest(unittest.TestCase):
    def test_a_section_end_to_end(self):
        torch = types.ModuleType("torch")
        torch.__version__, torch.version = "0", types.SimpleNamespace(cuda="0")
        torch.backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 0))
        sys.modules["torch"], before = torch, sys.modules.get("torch")
        self.addCleanup(lambda: sys.modules.update(torch=before) if before else sys.modules.pop("torch"))
        with tempfile.TemporaryDirectory() as folder:
            ours = pathlib.Path(folder, "stream-cqsa")
            ours.write_text(FAKE_PROGRAM)
            ours.chmod(ours.stat().st_mode | stat.S_IXUSR)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                status = program.main(["--program", str(ours), "--launcher", "", "--output-dir", folder,
                                       "--sections", "decomposition", "--quick"])
            text = pathlib.Path(folder, "gpu_decomposition.json").read_text()
        self.assertNotIn(folder, text)
        result = json.loads(text)
        of = result["rows"][0]["results"]
        self.assertEqual(status, 1)  # c = 31 failed
        self.assertEqual(of["c=31"]["error"], "stream-cqsa: input: too large")
        self.assertEqual([of[c]["kernel_seconds"] for c in ("c=1", "c=7", "c=133")], [2, 8, 134])
        self.assertEqual((of["c=7"]["over_base"], of["c=7"]["subproblems"]), (4, 7))
        self.assertEqual(result["program"], ["stream-cqsa 1.2.3"])
        self.assertIn("too large", printed.getvalue())

    def test_safetensors_hold_what_was_given(self):
        rng = np.random.default_rng(20605)
        arrays = {name: rng.integers(0, 1 << 16, (1, 5, 2, 3), dtype=np.uint16) for name in "qkv"}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "x.safetensors")
            bench_accuracy.write_safetensors(path, {n: (a.shape, a.tobytes()) for n, a in arrays.items()}, "bf16")
            data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        self.assertEqual((8 + size) % 8, 0)
        for name, array in arrays.items():
            begin, end = header[name]["data_offsets"]
            self.assertEqual((header[name]["dtype"], header[name]["shape"]), ("BF16", [1, 5, 2, 3]))
            self.assertEqual(data[8 + size + begin:8 + size + end], array.tobytes())


if __name__ == "__main__":
    unittest.main()
