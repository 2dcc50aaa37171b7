"""stream-cqsa run, plan, generate and verify as a user runs them, against numpy."""

import json
import unittest
import xml.etree.ElementTree

import numpy as np

from cli import CliTest, attention, read_safetensors, write_safetensors


class Run(CliTest):

    def check(self, arrays, *options, causal=False, tolerance=2e-6):
        self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--lse",
                     self.path("lse.npy"), "--quiet", *(["--causal"] if causal else []), *options)
        expected, lse = attention(*arrays, causal=causal)
        np.testing.assert_allclose(np.load(self.path("o.npy")).astype(np.float64), expected,
                                   atol=tolerance, rtol=0)
        np.testing.assert_allclose(np.load(self.path("lse.npy")), lse, atol=1e-5, rtol=1e-6)

    def test_agrees_with_numpy(self):
        self.check(self.save_inputs())

    def test_agrees_with_numpy_divided_and_causal(self):
        arrays = self.save_inputs(shape=(2, 333, 4, 24), kv_shape=(2, 333, 2, 24))
        self.check(arrays, "--chunks", "13", causal=True)

    def test_cross_attention_with_small_memory(self):
        arrays = self.save_inputs(shape=(1, 500, 2, 16), kv_shape=(1, 3000, 2, 16))
        self.check(arrays, "--device-memory", "3MiB", "--host-memory", "2MiB", "--threads", "1")

    def test_float64_input_gives_float64_output(self):
        arrays = self.save_inputs(dtype=np.float64)
        self.check(arrays)
        self.assertEqual(np.load(self.path("o.npy")).dtype, np.float64)

    def test_float16_output_is_rounded_once(self):
        arrays = self.save_inputs(dtype=np.float16)
        self.check(arrays, tolerance=2e-3)
        self.assertEqual(np.load(self.path("o.npy")).dtype, np.float16)

    def test_more_queries_than_keys_leave_rows_empty(self):
        arrays = self.save_inputs(shape=(1, 300, 1, 8), kv_shape=(1, 40, 1, 8))
        self.check(arrays, "--chunks", "7", causal=True)
        self.assertTrue(np.all(np.load(self.path("o.npy"))[0, :260] == 0))

    def test_one_token(self):
        self.check(self.save_inputs(shape=(1, 1, 1, 4)), "--chunks", "7", causal=True)

    def test_ranks_two_and_three_keep_their_shape(self):
        for shape in [(50, 8), (50, 3, 8)]:
            arrays = self.save_inputs(shape=shape)
            self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--overwrite", "--quiet")
            full = [array.reshape(1, 50, -1, 8) for array in arrays]
            output = np.load(self.path("o.npy"))
            self.assertEqual(output.shape, shape)
            np.testing.assert_allclose(output.reshape(1, 50, -1, 8), attention(*full)[0], atol=2e-6)

    def test_layout_bhsd(self):
        arrays = self.save_inputs(shape=(2, 3, 70, 8))
        self.succeed("run", *self.inputs(), "--layout", "bhsd", "--output", self.path("o.npy"),
                     "--chunks", "7", "--quiet")
        expected = attention(*[array.transpose(0, 2, 1, 3) for array in arrays])[0]
        np.testing.assert_allclose(np.load(self.path("o.npy")), expected.transpose(0, 2, 1, 3), atol=2e-6)

    def test_safetensors_in_and_bfloat16_out(self):
        arrays = [self.random((100, 2, 16), np.float32, seed) for seed in range(3)]
        write_safetensors(self.path("qkv.safetensors"), dict(zip("qkv", arrays)))
        self.succeed("run", "--input", self.path("qkv.safetensors"), "--output",
                     self.path("o.safetensors"), "--output-dtype", "bf16", "--quiet")
        output = read_safetensors(self.path("o.safetensors"))["o"]
        expected = attention(*[array[None] for array in arrays])[0][0]
        np.testing.assert_allclose(output, expected, atol=2e-2)

    def test_scale(self):
        arrays = self.save_inputs()
        self.succeed("run", *self.inputs(), "--scale", "0.7", "--output", self.path("o.npy"), "--quiet")
        np.testing.assert_allclose(np.load(self.path("o.npy")), attention(*arrays, scale=0.7)[0], atol=2e-6)

    def test_the_same_bits_for_any_threads_and_memory_for_accumulators(self):
        self.save_inputs(shape=(1, 2000, 2, 32))
        outputs = []
        for options in (["--threads", "1"], ["--threads", "3"],
                        ["--host-memory", "400KiB", "--device-memory", "2MiB", "--scratch", self.folder]):
            self.succeed("run", *self.inputs(), "--chunks", "13", "--heads-per-group", "1", "--output",
                         self.path("o.npy"), "--overwrite", "--quiet", *options)
            outputs.append(self.path("o.npy").read_bytes())
        self.assertEqual(outputs[0], outputs[1])
        self.assertEqual(outputs[0], outputs[2])

    def test_the_same_bits_past_the_page_cache(self):
        # 600,128 bytes a file: neither its end nor a block's is on a page's boundary.
        self.save_inputs(shape=(1, 1875, 2, 40))
        outputs, direct = [], []
        for when in ("no", "auto", "yes"):
            self.succeed("run", *self.inputs(), "--direct-io", when, "--chunks", "13", "--heads-per-group", "1",
                         "--host-memory", "500KiB", "--device-memory", "3MiB", "--scratch", self.folder, "--output",
                         self.path("o.npy"), "--overwrite", "--quiet", "--report", self.path("r.json"))
            outputs.append(self.path("o.npy").read_bytes())
            direct.append(json.loads(self.path("r.json").read_text())["direct_io"])
            done = self.succeed("plan", *self.inputs(), "--direct-io", when)
            self.assertEqual("past the page cache" in done.stdout, when == "yes")
            self.succeed("verify", *self.inputs(), "--direct-io", when, "--output", self.path("o.npy"), "--quiet")
        self.assertEqual(outputs[0], outputs[1])
        self.assertEqual(outputs[0], outputs[2])
        self.assertEqual(direct, [False, False, True])

    def test_nan_and_infinity_are_legal_and_counted(self):
        query, key, value = self.save_inputs(shape=(1, 64, 1, 8))
        value[0, 40, 0, 3] = np.inf
        key[0, 60, 0, 0] = np.nan
        np.save(self.path("v.npy"), value)
        np.save(self.path("k.npy"), key)
        self.succeed("run", *self.inputs(), "--causal", "--chunks", "7", "--output", self.path("o.npy"),
                     "--report", self.path("r.json"), "--quiet")
        output = np.load(self.path("o.npy"))
        self.assertTrue(np.isfinite(output[0, :40]).all())
        self.assertFalse(np.isfinite(output[0, 40:, 0, 3]).any())
        self.assertTrue(np.isnan(output[0, 60:]).all())
        others = [0, 1, 2, 4, 5, 6, 7]
        self.assertTrue(np.isfinite(output[0, 40:60][..., others]).all())
        certificate = json.loads(self.path("r.json").read_text())["certificate"]
        self.assertEqual(certificate["key"]["nan"], 1)
        self.assertEqual(certificate["value"]["infinite"], 1)
        self.assertEqual(certificate["output"]["nan"] + certificate["output"]["infinite"],
                         int((~np.isfinite(output)).sum()))

    def test_synthetic_is_what_generate_writes(self):
        shape = ["--shape", "1,300,4,16", "--kv-heads", "2", "--dtype", "f32"]
        self.succeed("generate", *shape, "--seed", "5", *self.inputs())
        self.succeed("run", *self.inputs(), "--chunks", "7", "--output", self.path("a.npy"), "--quiet")
        self.succeed("run", "--input", "synthetic:5", *shape, "--chunks", "7", "--output", self.path("b.npy"),
                     "--quiet")
        self.assertEqual(self.path("a.npy").read_bytes(), self.path("b.npy").read_bytes())
        arrays = [np.load(self.path(f"{name}.npy")) for name in "qkv"]
        np.testing.assert_allclose(np.load(self.path("a.npy")), attention(*arrays)[0], atol=2e-6)

    def test_generate_writes_one_file_too(self):
        for layout, dtype in (("bshd", "f16"), ("bhsd", "bf16")):
            shape = ["--shape", "2,300,4,16", "--kv-heads", "2", "--key-length", "170", "--dtype", dtype]
            file = self.path(f"{dtype}.safetensors")
            three = [self.path(f"{name}.safetensors") for name in "qkv"]
            self.succeed("generate", *shape, "--layout", layout, "--seed", "5", "--output", file)
            self.succeed("generate", *shape, "--layout", layout, "--seed", "5", "--overwrite", "--query", three[0],
                         "--key", three[1], "--value", three[2])
            tensors = read_safetensors(file)
            self.assertEqual(list(tensors), ["q", "k", "v"])
            for name, path in zip("qkv", three):
                np.testing.assert_array_equal(tensors[name], read_safetensors(path)[name])
            self.succeed("run", "--input", file, "--layout", layout, "--output", self.path("o.safetensors"),
                         "--overwrite", "--quiet")
            order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
            expected = attention(*[tensors[name].transpose(order) for name in "qkv"])[0]
            output = read_safetensors(self.path("o.safetensors"))["o"].transpose(order)
            np.testing.assert_allclose(output, expected, atol=2e-2 if dtype == "bf16" else 2e-3)


class Report(CliTest):

    def test_report_and_trace(self):
        self.save_inputs()
        done = self.succeed("run", *self.inputs(), "--chunks", "7", "--output", self.path("o.npy"),
                            "--report", self.path("r.json"), "--trace", self.path("t.json"))
        report = json.loads(self.path("r.json").read_text())
        certificate = report["certificate"]
        self.assertTrue(certificate["ok"])
        self.assertEqual(certificate["scores_merged"], certificate["scores_kept_by_mask"])
        self.assertEqual(sum(certificate["scores_merged"]), 200 * 200 * 2)
        for part in ("device", "host"):
            memory = report["memory"][part]
            self.assertEqual(memory["planned"], memory["allocated"])
            self.assertLessEqual(memory["planned"], memory["budget"])
        device = report["memory"]["device"]
        self.assertGreaterEqual(device["in_use"], device["allocated"])
        for stage in ("read", "copy in", "compute", "copy out", "merge", "write", "checksum", "verify", "sync"):
            self.assertGreater(report["stages"][stage]["operations"], 0, stage)
        self.assertLessEqual(report["stages"]["verify"]["busy_seconds"] + report["stages"]["sync"]["busy_seconds"]
                             + report["seconds"], report["total_seconds"])
        # Q, K, V and O, each once.
        self.assertEqual(report["stages"]["checksum"]["bytes"], 4 * 200 * 2 * 16 * 4)
        self.assertEqual(report["plan"]["c"], 7)
        events = json.loads(self.path("t.json").read_text())
        self.assertTrue({"read", "compute", "write"} <= {event["name"] for event in events})
        self.assertTrue(all(event["dur"] >= 0 for event in events))
        self.assertIn("compute", done.stdout)
        self.assertIn("verified", done.stdout)

    def test_checksums_do_not_depend_on_the_division(self):
        self.save_inputs(shape=(1, 500, 3, 16))
        seen = set()
        for options in (["--chunks", "1"], ["--chunks", "13", "--heads-per-group", "1"],
                        ["--host-memory", "200KiB", "--scratch", self.folder]):
            self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--overwrite", "--report",
                         self.path("r.json"), "--quiet", *options)
            certificate = json.loads(self.path("r.json").read_text())["certificate"]
            seen.add(tuple(certificate[name]["checksum"] for name in ("query", "key", "value")))
            self.assertEqual(certificate["query"]["vectors"], certificate["query"]["of_vectors"])
        self.assertEqual(len(seen), 1)


class Plan(CliTest):

    shape = ["--input", "synthetic:1", "--shape", "1,4096,2,64", "--causal"]

    def test_json_covers_every_live_pair_once(self):
        done = self.succeed("plan", *self.shape, "--chunks", "13", "--json", "--subproblems")
        plan = json.loads(done.stdout)
        self.assertEqual(len(plan["subproblems"]), plan["subproblem_count"])
        seen = {}
        for subproblem in plan["subproblems"]:
            for query, key, liveness in subproblem["pairs"]:
                place = (subproblem["batch"], tuple(subproblem["head_group"]), query, key)
                self.assertNotIn(place, seen)
                seen[place] = liveness
                self.assertIn(query, subproblem["chunks"])
                self.assertIn(key, subproblem["chunks"])
        groups = len(plan["head_groups"])
        self.assertEqual(len(seen), groups * 13 * 14 // 2)
        for (_, _, query, key), liveness in seen.items():
            self.assertEqual(liveness, "partial" if query == key else "full")

    def test_a_printed_plan_runs(self):
        self.save_inputs()
        plan = self.succeed("plan", *self.inputs(), "--chunks", "7", "--json").stdout
        self.path("plan.json").write_text(plan)
        again = json.loads(self.succeed("plan", *self.inputs(), "--plan", self.path("plan.json"), "--json").stdout)
        first = json.loads(plan)
        for key in ("alternatives", "smallest_budget"):  # of what the options left open
            del first[key], again[key]
        self.assertEqual(first, again)
        self.succeed("run", *self.inputs(), "--plan", self.path("plan.json"), "--output",
                     self.path("o.npy"), "--quiet")
        whole = self.path("o.npy").read_bytes()
        for threads in ("1", "3"):
            self.succeed("run", *self.inputs(), "--plan", self.path("plan.json"), "--output",
                         self.path("o.npy"), "--overwrite", "--quiet", "--threads", threads)
            self.assertEqual(self.path("o.npy").read_bytes(), whole)
        self.save_inputs(shape=(1, 100, 2, 16))
        self.refuse("run", *self.inputs(), "--plan", self.path("plan.json"), "--output", self.path("p.npy"))

    def test_table_and_drawing(self):
        done = self.succeed("plan", *self.shape, "--device-memory", "2MiB", "--svg", self.path("p.svg"))
        self.assertIn("2.00 MiB", done.stdout)
        xml.etree.ElementTree.parse(self.path("p.svg"))

    def test_a_billion_tokens(self):
        done = self.succeed("plan", "--input", "synthetic:1", "--shape", "1,1073741824,8,128",
                            "--chunks", "11557", "--host-memory", "64GiB", "--device-memory", "64GiB",
                            "--scratch", self.folder, "--json")
        self.assertEqual(json.loads(done.stdout)["c"], 11557)


class Texts(CliTest):

    def test_help_of_every_command(self):
        text = self.succeed("--help").stdout
        for command in ("run", "plan", "generate", "verify", "devices", "bench"):
            self.assertIn(command, text)
            self.assertIn("usage: stream-cqsa " + command, self.succeed(command, "--help").stdout)

    def test_version(self):
        text = self.succeed("--version").stdout
        for word in ("commit", "build", "backends", "mpi", "Open MPI"):
            self.assertIn(word, text)

    def test_devices(self):
        text = self.succeed("devices").stdout
        self.assertIn("cores", text)
        # A GPU, or why there is none.
        self.assertRegex(text, r"\ncuda    none: \w+|\n        compute capability \d.*\n        (16-bit inputs: (Hopper|portable) kernel|CUDA device)")


if __name__ == "__main__":
    unittest.main()
