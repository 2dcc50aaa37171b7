// One plan computed on all ranks of a test, and on one: the same bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>

#include "mpi/master.hpp"
#include "mpi/merger.hpp"
#include "mpi/worker.hpp"
#include "support/attention.hpp"
#include "support/mpi_world.hpp"
#include "support/run_plan.hpp"

namespace stream_cqsa::testing {

/// What all ranks do alike, from the same seed.
struct Case {
  Problem problem;
  Layout layout = Layout::bshd;
  Plan plan;
  TestInput input;
};

/// A random problem, and a plan for the ranks that there are.
Case random_case(std::mt19937_64& random, AccumulatorPlacement placement, int mergers = 0);

using MakeBackend = std::function<std::unique_ptr<Backend>()>;
using OpenSource = std::function<std::unique_ptr<TensorSource>(const TestTensor&)>;

/// Called before a rank writes to O for the nth time, from 0 on.
using BeforeWrite = std::function<void(int)>;

/// Memory, the workers' devices and a file in turn.
AccumulatorPlacement placement_of(std::uint64_t trial);

/// This rank's part of a distributed run. Where it merges, the rows that it merges are in the
/// outcome. With `through_master` rank 0 alone has sources, opened so. Ranks that merge keep the
/// checkpoint given, if that has a directory.
Outcome run_on_ranks(
    const Case& own, const MakeBackend& make_backend, MasterResult& master, WorkerResult& worker,
    int mergers = 0, MergerResult* merger = nullptr, const BeforeWrite& before_write = [](int) {},
    const OpenSource& through_master = nullptr, const CheckpointOptions& checkpoint = {});

/// The parts of all ranks that merged, which share no byte, at rank 0.
Outcome together(const Outcome& part, int mergers);

/// Compares with a run on one rank.
void check_same_bytes(const Case& own, const Outcome& outcome);

/// Takes its time, at random: differently on every rank.
std::unique_ptr<Backend> delayed_backend(std::uint64_t trial);

/// The same, but on the rank `failing` one that fails: in a lane and after a number of operations
/// that follow from `trial` and `random`.
MakeBackend failing_on(int failing, std::uint64_t trial, std::mt19937_64& random);

}  // namespace stream_cqsa::testing
