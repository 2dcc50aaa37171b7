"""A discrete-event model of a run: a master, its workers, and what each has to do for a subproblem.

What is modelled: the master hands out subproblems one at a time, each costing it dispatch_seconds; a worker
has its next one while it computes, and loads the blocks that it does not hold meanwhile; it prefers, among the
oldest of those left, the one whose blocks it holds most of; a partial is copied out and sent over the master's
link, the merging goes on while it arrives, and a finished query chunk is written. A worker has two state
buffers, and the master takes partials in only as fast as it has room for: a slow master holds the workers back.
What is not: failures, kernels of unequal speed, the order of merging (it costs memory, not work) and start-up.
"""

import heapq
import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, fields
from itertools import islice

from problem import ITEM_BYTES
from scaling_runs import BadInput
from simulated_divisions import token_bytes

LOOKAHEAD = 16   # of the oldest subproblems left, how many a worker chooses from


@dataclass(frozen=True)
class Costs:
    """Rates in bytes or flop per second, 0 for one that never limits. The defaults are of one H100 a worker,
    inputs in host memory, a 25 GB/s network and a master of 16 cores."""
    kernel_flop_per_second: float = 500e12
    shared_flop_per_second: float = 0.0      # of all workers together: where they share the cores
    launch_seconds: float = 50e-6            # of a subproblem's kernel
    read_bytes_per_second: float = 0.0       # of a worker from storage, what it does not hold in host memory
    storage_bytes_per_second: float = 0.0    # of storage, all workers together
    copy_in_bytes_per_second: float = 54e9
    copy_out_bytes_per_second: float = 43e9
    send_bytes_per_second: float = 25e9      # of one worker's link; a ring's neighbours too
    receive_bytes_per_second: float = 25e9   # of the master's link
    message_seconds: float = 10e-6
    dispatch_seconds: float = 100e-6         # of the master, for handing out and booking a subproblem
    merge_bytes_per_second: float = 4e9      # of partials, one thread
    merge_threads: int = 16
    merge_bytes_per_second_all: float = 30e9  # however many threads: the memory's bandwidth
    write_bytes_per_second: float = 5e9      # of outputs
    device_cache_bytes: float = 4e9          # of a worker
    host_cache_bytes: float = 64e9           # of a worker
    master_buffer_bytes: float = 16e9        # of partials that are received and not yet merged
    mergers: int = 0                         # ranks that share merging and partials evenly; 0: the master alone

    @classmethod
    def of(cls, values):
        """From a dictionary that has some of them. Throws BadInput."""
        known = {one.name for one in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise BadInput(f"cost '{name}' is not known; use {', '.join(sorted(known))}")
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise BadInput(f"cost '{name}' is {value!r}; a number from 0")
        return cls(**values)

    def merge_rate(self):
        rates = [self.merge_bytes_per_second * self.merge_threads, self.merge_bytes_per_second_all]
        return self.mergers_in_all() * min((rate for rate in rates if rate), default=0.0)

    def mergers_in_all(self):
        return max(1, self.mergers)

    def kernel_rate(self, workers):
        rates = [self.kernel_flop_per_second, self.shared_flop_per_second / workers]
        return min((rate for rate in rates if rate), default=0.0)


def slowest(*rates):
    return min((rate for rate in rates if rate), default=0.0)


def time_of(amount, rate):
    return amount / rate if rate else 0.0


@dataclass
class Outcome:
    """What a simulated run took."""
    seconds: float = 0.0
    bytes_in: list = field(default_factory=list)     # copied in (a ring: received as well), by worker
    bytes_out: float = 0.0                           # partials sent, all workers
    compute_seconds: float = 0.0                     # all workers
    merge_seconds: float = 0.0                       # of the master
    other_seconds: float = 0.0                       # of the master: dispatch
    link_seconds: float = 0.0                        # of the master's link


class Cache:
    """What a worker holds, the longest unused dropped first."""

    def __init__(self, capacity):
        self.capacity, self.held, self.bytes = capacity, OrderedDict(), 0.0

    def load(self, task):
        """Makes the task's blocks held; returns the bytes that were not."""
        missed = 0.0
        for block in task.blocks:
            if block in self.held:
                self.held.move_to_end(block)
            else:
                self.held[block] = task.block_bytes[block]
                missed += self.held[block]
        self.bytes += missed
        while self.bytes > self.capacity and len(self.held) > len(task.blocks):
            self.bytes -= self.held.popitem(last=False)[1]
        return missed


class Worker:
    def __init__(self, costs):
        self.device, self.host = Cache(costs.device_cache_bytes), Cache(costs.host_cache_bytes)
        self.ready, self.buffers, self.busy, self.load_free = deque(), 2, False, 0.0


class Simulation:
    """One run of `tasks` on so many workers. Alone, a worker is its own master and merges on its device."""

    def __init__(self, shape, tasks, workers, costs, alone=None):
        self.costs, self.alone = costs, workers == 1 if alone is None else alone
        self.workers = [Worker(costs) for _ in range(workers)]
        self.rate = costs.kernel_rate(workers)
        self.left = deque(task for task in tasks if task.worker is None)
        self.own = [deque() for _ in range(workers)]
        for task in tasks:
            if task.worker is not None:
                self.own[task.worker].append(task)
        self.partials = Counter(row for task in tasks for row in task.rows)  # still to be merged, by accumulator
        self.row_bytes = shape.length * token_bytes(shape, 1, shape.heads) / len(self.partials)
        self.outcome = Outcome(bytes_in=[0.0] * workers)
        self.events, self.count = [], 0
        self.master_free = self.link_free = self.merge_free = self.write_free = self.storage_free = 0.0

    def run(self):
        for _ in range(2):  # the one to compute and the one ahead
            for index in range(len(self.workers)):
                self.at(0.0, self.ask, index)
        while self.events:
            now, _, handle, arguments = heapq.heappop(self.events)
            self.outcome.seconds = max(self.outcome.seconds, now)
            handle(now, *arguments)
        self.outcome.seconds = max(self.outcome.seconds, self.merge_free, self.write_free)
        return self.outcome

    def at(self, time, handle, *arguments):
        self.count += 1
        heapq.heappush(self.events, (time, self.count, handle, arguments))

    def next_task(self, index):
        if self.own[index]:
            return self.own[index].popleft()
        if not self.left:
            return None
        held = self.workers[index].device.held
        best = 0
        if held:
            shared = [len(task.blocks & held.keys()) for task in islice(self.left, LOOKAHEAD)]
            best = shared.index(max(shared))
        task = self.left[best]
        del self.left[best]
        return task

    def ask(self, now, index):
        """A worker can take one more: the master finds it, and the worker loads it."""
        task = self.next_task(index)
        if task is None:
            return
        costs, worker = self.costs, self.workers[index]
        dispatch = 0.0 if task.finished else costs.dispatch_seconds  # whole head groups are handed out at once
        self.master_free = max(now, self.master_free) + dispatch
        self.outcome.other_seconds += dispatch
        begin = max(self.master_free + (0.0 if self.alone else costs.message_seconds), worker.load_free)
        missed = worker.device.load(task)
        read = worker.host.load(task) if costs.read_bytes_per_second or costs.storage_bytes_per_second else 0.0
        if read:
            self.storage_free = max(begin, self.storage_free) + time_of(read, costs.storage_bytes_per_second)
        end = begin + max(time_of(read, costs.read_bytes_per_second), time_of(missed, costs.copy_in_bytes_per_second))
        worker.load_free = max(end, self.storage_free) if read else end
        self.outcome.bytes_in[index] += missed
        self.at(worker.load_free, self.loaded, index, task)

    def loaded(self, now, index, task):
        self.workers[index].ready.append(task)
        self.start(now, index)

    def start(self, now, index):
        worker = self.workers[index]
        if worker.busy or not worker.ready or not worker.buffers:
            return
        task = worker.ready.popleft()
        worker.busy = True
        worker.buffers -= 1
        seconds = self.costs.launch_seconds + time_of(task.flops, self.rate)
        self.outcome.compute_seconds += seconds
        self.at(now + seconds, self.computed, index, task)

    def computed(self, now, index, task):
        self.workers[index].busy = False
        self.at(now, self.ask, index)
        self.at(self.deliver(now, task), self.freed, index)
        self.start(now, index)

    def freed(self, now, index):
        self.workers[index].buffers += 1
        self.start(now, index)

    def deliver(self, now, task):
        """Sends and merges a task's partials; returns when the worker's buffer is free again."""
        costs = self.costs
        if not task.partial_bytes:
            return now
        if self.alone:
            self.finish_rows(now, task, costs.copy_out_bytes_per_second)
            return now
        rate = costs.merge_rate()
        merging = 0.0 if task.finished else time_of(task.partial_bytes, rate)
        begin = max(now + costs.message_seconds, self.link_free,
                    self.merge_free - time_of(costs.master_buffer_bytes, rate))
        on_link = time_of(task.partial_bytes, costs.receive_bytes_per_second * costs.mergers_in_all())
        self.link_free = begin + on_link
        received = begin + time_of(task.partial_bytes, slowest(costs.copy_out_bytes_per_second,
                                                               costs.send_bytes_per_second,
                                                               costs.receive_bytes_per_second))
        self.merge_free = max(begin, self.merge_free) + merging
        self.outcome.link_seconds += on_link
        self.outcome.merge_seconds += merging
        self.outcome.bytes_out += task.partial_bytes
        self.finish_rows(max(received, self.merge_free), task, 0.0)
        return received

    def finish_rows(self, now, task, copy_out_rate):
        for row in task.rows:
            self.partials[row] -= 1
            if self.partials[row] == 0:
                rate = slowest(self.costs.write_bytes_per_second, copy_out_rate)
                self.write_free = max(now, self.write_free) + time_of(self.row_bytes, rate)


def simulate_ring(shape, workers, costs):
    """Ring attention: each of R workers holds N/R queries of all its heads, and K and V go round in R steps,
    a step ahead of what is computed. Causal work is taken as evenly spread (zigzag or striped)."""
    groups = math.gcd(shape.heads, workers)
    ring, heads = workers // groups, shape.heads / groups
    tokens = shape.length / ring
    block = tokens * token_bytes(shape, 2, heads)
    compute = costs.launch_seconds + time_of(shape.flops() / workers / ring, costs.kernel_rate(workers))
    own = tokens * token_bytes(shape, 3, heads)
    received = time_of(own, slowest(costs.read_bytes_per_second, costs.copy_in_bytes_per_second,
                                    costs.storage_bytes_per_second / workers))
    passing = costs.message_seconds + time_of(block, costs.send_bytes_per_second)
    computed = 0.0
    for _ in range(ring):
        begin = max(received, computed)
        # The next block is received while this one is computed, into the buffer of the one before.
        received, computed = begin + passing, begin + compute
    written = shape.length * shape.heads * shape.dim * ITEM_BYTES[shape.dtype]
    return Outcome(seconds=computed + time_of(written, costs.write_bytes_per_second),
                   bytes_in=[own + (ring - 1) * block] * workers, compute_seconds=compute * ring * workers)
