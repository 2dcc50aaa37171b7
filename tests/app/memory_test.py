"""The peak resident set stays under the budgets and the documented overhead, whatever the files hold."""

import json
import unittest

from cli import CliTest

MIB = 1 << 20
# README.md, "Memory": the program, its libraries and threads, beside what the plan accounts for.
OVERHEAD = 160 * MIB


class PeakMemory(CliTest):

    def measure(self, device, host, *options):
        self.succeed("run", *self.inputs(), "--output", self.path("o.npy"), "--overwrite", "--quiet",
                     "--report", self.path("r.json"), "--threads", "2",
                     "--device-memory", device, "--host-memory", host, *options)
        memory = json.loads(self.path("r.json").read_text())["memory"]
        for part, budget in (("device", device), ("host", host)):
            self.assertLessEqual(memory[part]["planned"], budget)
            self.assertEqual(memory[part]["planned"], memory[part]["allocated"])
        self.assertLessEqual(memory["peak_resident"], device + host + OVERHEAD)
        return memory

    def test_files_of_many_times_the_budget(self):
        # Q, K, V and O of 64 MiB each; accumulators and all do not fit 2 x 16 MiB by far.
        self.succeed("generate", "--shape", "1,16384,32,64", "--dtype", "f16", *self.inputs())
        files = 4 * self.path("q.npy").stat().st_size
        device, host = 16 * MIB, 16 * MIB
        self.assertGreaterEqual(files, 4 * (device + host))
        memory = self.measure(device, host, "--scratch", self.folder, "--causal")
        self.assertLess(memory["peak_resident"], files)


if __name__ == "__main__":
    unittest.main()
