"""Tests of analysis/make_real_input.py against independent computations on a tiny made-up model."""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "analysis"))
import make_real_input as program  # noqa: E402  (needs the path above)

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "the", "cafe", ",", "$",
              "5", "##5", "日", "本", "##s"]
HIDDEN, HEADS, INNER, LAYERS, POSITIONS = 8, 2, 12, 3, 16


def write_model(folder, seed):
    """A BERT of random weights with the names and shapes of the real files."""
    rng = np.random.default_rng(seed)
    shapes = {"embeddings.word_embeddings.weight": (len(VOCABULARY), HIDDEN),
              "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
              "embeddings.token_type_embeddings.weight": (2, HIDDEN),
              "embeddings.LayerNorm.weight": (HIDDEN,), "embeddings.LayerNorm.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        for name, rows, columns in (("attention.self.query", HIDDEN, HIDDEN),
                                    ("attention.self.key", HIDDEN, HIDDEN),
                                    ("attention.self.value", HIDDEN, HIDDEN),
                                    ("attention.output.dense", HIDDEN, HIDDEN),
                                    ("intermediate.dense", INNER, HIDDEN),
                                    ("output.dense", HIDDEN, INNER)):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (HIDDEN,)
    weights = {name: rng.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    program.write_safetensors(os.path.join(folder, "model.safetensors"), weights, {})
    config = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
              "max_position_embeddings": POSITIONS, "layer_norm_eps": 1e-12}
    pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    pathlib.Path(folder, "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return {name: array.astype(np.float64) for name, array in weights.items()}


def reference_layer_inputs(w, ids, layer):
    """Q, K and V of one window by BERT's definition, in fp64, head by head and row by row."""
    def dense(x, name):
        return np.einsum("ti,oi->to", x, w[name + ".weight"]) + w[name + ".bias"]

    def norm(x, name):
        return np.stack([(row - row.mean()) / math.sqrt(row.var() + 1e-12) * w[name + ".weight"]
                         + w[name + ".bias"] for row in x])

    x = np.stack([w["embeddings.word_embeddings.weight"][id_]
                  + w["embeddings.position_embeddings.weight"][position]
                  + w["embeddings.token_type_embeddings.weight"][0]
                  for position, id_ in enumerate(ids)])
    x = norm(x, "embeddings.LayerNorm")
    dim = HIDDEN // HEADS
    for index in range(layer + 1):
        prefix = f"encoder.layer.{index}."
        q, k, v = (dense(x, f"{prefix}attention.self.{part}") for part in ("query", "key", "value"))
        if index == layer:
            return q, k, v
        mixed = np.zeros_like(x)
        for head in range(HEADS):
            columns = slice(head * dim, (head + 1) * dim)
            for token in range(len(x)):
                scores = np.array([q[token, columns] @ row[columns] for row in k]) / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                mixed[token, columns] = weights @ v[:, columns] / weights.sum()
        x = norm(x + dense(mixed, prefix + "attention.output.dense"),
                 prefix + "attention.output.LayerNorm")
        inner = np.vectorize(lambda y: y * 0.5 * (1 + math.erf(y / math.sqrt(2))))(
            dense(x, prefix + "intermediate.dense"))
        x = norm(x + dense(inner, prefix + "output.dense"), prefix + "output.LayerNorm")


class TokenizerTest(unittest.TestCase):
    def test_pieces(self):
        tokenizer = program.WordPiece(VOCABULARY)
        cases = {"unaffable": ["un", "##aff", "##able"],
                 "UNAFFABLE, the": ["un", "##aff", "##able", ",", "the"],
                 "Café\tcafe\u0301s": ["cafe", "cafe", "##s"], "$55": ["$", "5", "##5"],
                 "日本the": ["日", "本", "the"], "the\u200b\x00\ufffd the": ["the", "the"],
                 "zebra theX": ["[UNK]", "[UNK]"], "5" * 101: ["[UNK]"],
                 "5" * 100: ["5"] + ["##5"] * 99, " \n\u00a0": []}
        for text, pieces in cases.items():
            with self.subTest(text=text):
                self.assertEqual([VOCABULARY[i] for i in tokenizer.encode(text)], pieces)


class ProgramTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.seed = 20604
        self.weights = write_model(self.folder, self.seed)
        self.text = os.path.join(self.folder, "text.txt")
        pathlib.Path(self.text).write_text("the unaffable cafe, $5 日本 " * 40, encoding="utf-8")
        self.output = os.path.join(self.folder, "qkv.safetensors")

    def run_program(self, *options):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
                io.StringIO()) as errors:
            status = program.main(["--model", self.folder, "--output", self.output, *options])
        return status, errors.getvalue()

    def expected(self, tokens, layer):
        """[part][token][hidden] from the reference, window by window."""
        ids = program.WordPiece(VOCABULARY).encode(pathlib.Path(self.text).read_text("utf-8"))
        windows, position = [], 0
        for begin in range(0, tokens, POSITIONS):
            size = min(POSITIONS, tokens - begin)
            body = max(0, size - 2)
            window = ([2] + ids[position:position + body] + [3])[:size]
            position += body
            windows.append(reference_layer_inputs(self.weights, window, layer))
        return [np.concatenate([window[part] for window in windows]) for part in range(3)]

    def test_agrees_with_the_definition(self):
        for tokens, layer in ((POSITIONS * 11 + 7, 2), (POSITIONS * 2, 0), (POSITIONS + 1, 1),
                              (1, 2)):
            with self.subTest(tokens=tokens, layer=layer, seed=self.seed):
                status, errors = self.run_program("--text", self.text, "--tokens", str(tokens),
                                                  "--layer", str(layer), "--dtype", "f32")
                self.assertEqual((status, errors), (0, ""))
                written = program.read_safetensors(self.output)
                self.assertEqual(list(written), ["q", "k", "v"])
                for name, expected in zip("qkv", self.expected(tokens, layer)):
                    self.assertEqual(written[name].shape, (tokens, HEADS, HIDDEN // HEADS))
                    error = np.abs(written[name].reshape(tokens, HIDDEN) - expected).max()
                    self.assertTrue(error <= 1e-4, f"{name}: {error}")

    def test_bad_input_is_one_line_and_leaves_nothing(self):
        for options, words in ((("--tokens", "99999"), "lower --tokens"),
                               (("--text", self.folder + "/none"), "cannot be read"),
                               (("--layer", "3"), "layers 0 to 2"),
                               (("--tokens", "0"), "at least 1")):
            with self.subTest(options=options):
                status, errors = self.run_program("--text", self.text, "--layer", "1", *options)
                self.assertEqual((status, errors.count("\n")), (2, 1))
                self.assertIn(words, errors)
                self.assertFalse(os.path.exists(self.output))


if __name__ == "__main__":
    unittest.main()
