"""Work lists for simulate.py: attention divided by cyclic quorum sets, into 2-D tiles, and as a ring.

All three divide the heads first, as those are independent. Lengths are real numbers: the program's rounding
of chunks to kernel tiles is left out, unless its own plan is used.
"""

import itertools
import json
import math
import subprocess
from typing import NamedTuple

import numpy as np

from problem import ITEM_BYTES
from scaling_runs import BadInput

MOST_CHUNKS = 20000     # max_modulus in include/stream_cqsa/difference_cover.hpp


class Task(NamedTuple):
    """A unit of scheduling. Blocks are named so that a worker that holds one need not load it again."""
    flops: float
    blocks: frozenset       # names of those of Q, and of K with V, that it needs
    block_bytes: dict       # block -> bytes; shared by tasks
    rows: tuple             # accumulators that a partial goes to
    partial_bytes: float    # of all its partials together
    worker: int | None      # who must run it; None: whoever is free
    finished: bool = False  # the partials are finished rows: merged by the worker already


def state_bytes(shape, tokens, heads):
    """(acc, m, l) in fp32 of every query row."""
    return tokens * heads * (shape.dim + 2) * 4


def token_bytes(shape, tensors, heads):
    return tensors * heads * shape.dim * ITEM_BYTES[shape.dtype]


# --- covers ---


def singer_cover(q):
    """q + 1 residues mod q*q + q + 1 with every difference once, q prime: those powers of a generator x of
    GF(q^3) that lie in the plane spanned by 1 and x."""
    # x^3 = square x^2 + linear x + constant; the constant varies first, as where 3 divides q - 1 no cube serves.
    for square, linear, constant in itertools.product(range(q), range(q), range(1, q)):
        members = plane_powers(q, square, linear, constant)
        if members:
            return members
    raise AssertionError(f"no Singer cover for q = {q}")


def plane_powers(q, square, linear, constant):
    """The exponents of x, below q*q + q + 1, that lie in the plane; none unless those powers are all the points."""
    c = q * q + q + 1
    power, members = (1, 0, 0), []
    for exponent in range(c):
        if power[2] == 0:
            if len(members) == q + 1 or (exponent > 0 and power[1] == 0):
                return []
            members.append(exponent)
        x0, x1, x2 = power
        power = (constant * x2 % q, (x0 + linear * x2) % q, (x1 + square * x2) % q)
    return members if len(members) == q + 1 and power[1] == power[2] == 0 else []


def wichmann_cover(c):
    """The fewest marks 4r + s + 3 of Wichmann's rulers of length at least c / 2; about 1.22 sqrt(c)."""
    best = None
    for r in range(c):
        if best and 4 * r + 3 >= 4 * best[0] + best[1] + 3:
            break
        missing = max(0, c // 2 - (4 * r * (r + 2) + 3))
        s = -(-missing // (4 * r + 3))
        if best is None or 4 * r + s < 4 * best[0] + best[1]:
            best = (r, s)
    r, s = best
    gaps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
    return sorted({int(mark) % c for mark in np.cumsum([0, *gaps])})


def is_prime(q):
    return q > 1 and all(q % p for p in range(2, math.isqrt(q) + 1))


def difference_cover(c):
    """Residues mod c whose differences give all of Z_c: as few as the program's where c = q*q + q + 1 with q
    prime, up to a fifth more elsewhere."""
    q = (math.isqrt(4 * c - 3) - 1) // 2
    if c <= 3:
        return list(range(min(c, 2)))
    return singer_cover(q) if c == q * q + q + 1 and is_prime(q) else wichmann_cover(c)


def perfect_count(least):
    """The smallest c >= least with a perfect cover that is built here, within what the program supports."""
    perfect = [1, 3, *(q * q + q + 1 for q in range(2, MOST_CHUNKS) if q * q + q + 1 <= MOST_CHUNKS and is_prime(q))]
    return next((c for c in perfect if c >= least), perfect[-1])


def responsibilities(cover, c):
    """r(d) by difference d: the residues (a, b), b - a = d, that the quorum computes that difference with."""
    chosen = {0: (0, 0)}
    for i, a in enumerate(cover):
        for b in cover[i + 1:]:
            if b - a not in chosen:
                chosen[c - (b - a)] = (b, a)
                chosen[b - a] = (a, b)
    return chosen


# --- divisions ---


def quorum_tasks(shape, c, groups, cover=None):
    """Every subproblem of a division by cyclic quorum sets, groups outside."""
    pairs = np.array([pair for _, pair in sorted(responsibilities(cover or difference_cover(c), c).items())])
    tokens, heads = shape.length / c, shape.heads / groups
    works = []
    for quorum in range(c):
        query, key = (quorum + pairs.T) % c
        live = key <= query if shape.causal else np.ones(c, bool)
        query, key = query[live], key[live]
        scores = tokens * tokens * (len(query) - (int(np.sum(query == key)) / 2 if shape.causal else 0))
        works.append((scores, np.unique(query).tolist(), np.unique(key).tolist()))
    return chunk_tasks(shape, [tokens] * c, [(work, group, heads) for group in range(groups) for work in works])


def shares_by_groups(groups, workers):
    """Whether whole head groups keep so many workers busy: then each is one worker's, as in the program."""
    return workers > 1 and groups >= 0.8 * workers * math.ceil(groups / workers)


def group_tasks(shape, c, groups, workers):
    """The subproblems of whole head groups, each group's on one worker, which merges on its device: what it sends
    after a subproblem are the rows that this finishes."""
    tasks = quorum_tasks(shape, c, groups)
    last = {row: index for index, task in enumerate(tasks) for row in task.rows}
    row_bytes = shape.length / c * token_bytes(shape, 1, shape.heads / groups)
    for index, task in enumerate(tasks):
        finished = tuple(row for row in task.rows if last[row] == index)
        tasks[index] = task._replace(rows=finished, partial_bytes=row_bytes * len(finished),
                                     worker=task.rows[0] // c % workers, finished=True)
    return tasks


def chunk_tasks(shape, tokens, works):
    """Tasks of works ((scores, query chunks, key chunks), group's number, heads); tokens: of each chunk.
    Chunk p of group g has accumulator g * c + p, and twice that and the next for its blocks of Q and of K and V."""
    sizes, tasks, c = {}, [], len(tokens)
    for group, heads in {(group, heads) for _, group, heads in works}:
        for chunk, length in enumerate(tokens):
            for tensor, tensors in enumerate((1, 2)):
                sizes[2 * (group * c + chunk) + tensor] = length * token_bytes(shape, tensors, heads)
    for (scores, queries, keys), group, heads in works:
        rows = tuple(group * c + chunk for chunk in queries)
        blocks = frozenset([*(2 * row for row in rows), *(2 * (group * c + chunk) + 1 for chunk in keys)])
        if scores > 0:
            tasks.append(Task(4 * shape.dim * heads * scores, blocks, sizes, rows,
                              state_bytes(shape, sum(tokens[chunk] for chunk in queries), heads), None))
    return tasks


def planned_tasks(shape, program, options):
    """The subproblems of the program's own plan. `options`: of `stream-cqsa plan`, besides the problem."""
    command = [*program, "plan", "--input", "synthetic:1", *shape.options(), *options, "--json", "--subproblems"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BadInput(f"--program {program[0]}: {error.strerror}; give the path of stream-cqsa") from error
    if done.returncode != 0:
        raise BadInput((done.stderr.strip() or "stream-cqsa plan failed").splitlines()[-1])
    plan = json.loads(done.stdout)
    ranges = plan["query_chunks"]
    tokens = [end - begin for begin, end in ranges]
    works, groups = [], plan["head_groups"]
    for one in plan["subproblems"]:
        scores = sum(tokens[p] * tokens[q] if live == "full" else kept(ranges[p], ranges[q])
                     for p, q, live in one["pairs"])
        queries, keys = (sorted({pair[side] for pair in one["pairs"]}) for side in (0, 1))
        works.append(((scores, queries, keys), groups.index(one["head_group"]), one["head_group"][1]))
    return chunk_tasks(shape, tokens, works)


def kept(queries, keys):
    """Scores that a causal mask keeps of a range of queries and one of keys."""
    return int(np.clip(np.minimum(keys[1], np.arange(*queries) + 1) - keys[0], 0, None).sum())


def tile_tasks(shape, workers, pieces):
    """A query range x key range for each worker, computed in `pieces` of the key range so that loading
    overlaps, its one partial sent at the end. Some workers of an awkward count stay idle."""
    groups = math.gcd(shape.heads, workers)
    each = workers // groups
    rows = (math.isqrt(8 * each + 1) - 1) // 2 if shape.causal else math.isqrt(each)
    columns = rows if shape.causal else each // rows
    tiles = [(row, column) for row in range(rows) for column in range(row + 1 if shape.causal else columns)]
    heads, queries, keys = shape.heads / groups, shape.length / rows, shape.length / columns
    sizes, tasks = {}, []
    for index, (group, row, column) in enumerate((g, *tile) for g in range(groups) for tile in tiles):
        share = 0.5 if shape.causal and row == column else 1.0
        for piece in range(pieces):
            needs = [("q", group, row), ("kv", group, column, piece)]
            sizes[needs[0]] = queries * token_bytes(shape, 1, heads)
            sizes[needs[1]] = keys / pieces * token_bytes(shape, 2, heads)
            last = piece == pieces - 1
            tasks.append(Task(4 * shape.dim * heads * queries * keys * share / pieces, frozenset(needs), sizes,
                              ((group, row),) if last else (),
                              state_bytes(shape, queries, heads) if last else 0.0, index))
    return tasks
