#define BOOST_TEST_MODULE engine_assembler
#include "engine/assembler.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <filesystem>
#include <random>

#include "core/merge_shares.hpp"
#include "engine/buffer.hpp"
#include "stream_cqsa/files.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using stream_cqsa::testing::small_plan;
using stream_cqsa::testing::SmallPlan;

namespace {

// All partials that a plan's subproblems produce, with made-up states that depend on the key alone.
std::vector<Partial> all_partials(const Plan& plan, std::vector<std::vector<std::byte>>& storage) {
  std::vector<Partial> partials;
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
    const SubproblemKey subproblem = plan.key(id);
    const QuorumWork work = plan.work(id);
    for (std::size_t position = 0; position < work.chunks.size(); ++position) {
      const bool query = std::any_of(
          work.pairs.begin(), work.pairs.end(),
          [&](const ChunkPair& pair) { return pair.query == static_cast<std::int32_t>(position); });
      if (!query) continue;
      const Chunk& chunk = work.chunks[position];
      for (std::int64_t piece = 0; piece < piece_count(plan, chunk.queries); ++piece) {
        const PieceKey key{subproblem.batch, subproblem.group, chunk.index, piece};
        const std::int64_t rows = piece_rows(plan, key);
        const std::int64_t dim = plan.problem().head_dim;
        storage.emplace_back(static_cast<std::size_t>(softmax_state_bytes(rows, dim)));
        const SoftmaxStates states = softmax_states_at(storage.back().data(), rows, dim);
        std::mt19937_64 random(
            static_cast<std::uint64_t>(id * 1000003 + chunk.index * 101 + piece));
        std::normal_distribution<float> normal;
        for (std::int64_t i = 0; i < rows; ++i) {
          states.m[i] = 3 * normal(random);
          states.l[i] = 1 + std::abs(normal(random));
          for (std::int64_t d = 0; d < dim; ++d) states.acc[i * dim + d] = normal(random);
        }
        partials.push_back({key, id, 1, 0, states});
      }
    }
  }
  return partials;
}

struct Outcome {
  std::vector<std::byte> output;
  std::vector<std::byte> lse;
  std::int64_t scratch_bytes = 0;
};

// Delivers the partials in the given order, each in a buffer of the assembler's.
Outcome assemble(const Plan& plan, const std::vector<Partial>& partials, int merge_threads) {
  const Problem& problem = plan.problem();
  TensorDesc desc{"o",           problem.output_dtype, Layout::bshd,        4,
                  problem.batch, problem.query_length, problem.query_heads, problem.head_dim};
  Outcome outcome;
  outcome.output.resize(static_cast<std::size_t>(desc.bytes()));
  const TensorDesc lse = lse_desc(problem.batch, problem.query_heads, problem.query_length);
  outcome.lse.resize(static_cast<std::size_t>(lse.bytes()));
  const auto output_sink = make_memory_sink(desc, outcome.output);
  const auto lse_sink = make_memory_sink(lse, outcome.lse);
  const Outputs outputs{*output_sink, lse_sink.get()};
  const HostBuffer memory(plan.host.bytes());
  RunOptions options;
  options.scratch = std::filesystem::temp_directory_path();
  options.merge_threads = merge_threads;
  options.write_threads = merge_threads;

  Telemetry telemetry;
  Abort abort;
  Assembler assembler(plan, outputs, memory.data(), options, telemetry, abort);
  {
    Crew crew(abort);
    assembler.start(crew);
    crew.start([&] {
      for (Partial partial : partials) {
        const auto buffer = assembler.wait_buffer();
        std::memcpy(
            buffer.data, partial.states.acc,
            static_cast<std::size_t>(softmax_state_bytes(partial.states.rows, partial.states.dim)));
        partial.buffer = buffer.number;
        partial.states = softmax_states_at(buffer.data, partial.states.rows, partial.states.dim);
        assembler.deliver(partial);
      }
      assembler.end_of_partials();
    });
    crew.join();
  }
  abort.rethrow_if_failed();
  outcome.scratch_bytes = assembler.scratch_bytes();
  return outcome;
}

// Deliveries in any order may hold every partial and open every piece at once.
Plan with_buffers(Plan plan, std::size_t count) {
  plan.host.state_buffers = plan.host.accumulators = static_cast<std::int64_t>(count);
  return plan;
}

}  // namespace

BOOST_AUTO_TEST_CASE(any_order_of_delivery_gives_the_same_bits) {
  const Plan plan = small_plan({.batch = 2, .ratio = 2, .kv_heads = 2, .length = 40, .chunks = 13});
  std::vector<std::vector<std::byte>> storage;
  std::vector<Partial> partials = all_partials(plan, storage);
  const Plan roomy = with_buffers(plan, partials.size());
  const Outcome in_order = assemble(roomy, partials, 1);
  std::mt19937_64 random(5);
  for (int trial = 0; trial < 12; ++trial) {
    std::shuffle(partials.begin(), partials.end(), random);
    const Outcome shuffled = assemble(roomy, partials, 1 + trial % 4);
    BOOST_TEST(shuffled.output == in_order.output);
    BOOST_TEST(shuffled.lse == in_order.lse);
  }
}

// However far the deliveries run ahead, the accumulators of one row are enough.
BOOST_AUTO_TEST_CASE(any_order_of_tiles_needs_the_accumulators_of_one_row) {
  // Keyless rows, too.
  for (const std::int64_t keys : {40, 12}) {
    Plan plan = small_plan({.batch = 2,
                            .ratio = 2,
                            .kv_heads = 2,
                            .length = 40,
                            .key_length = keys,
                            .causal = true,
                            .grid = Grid{8, 6}});
    plan.piece_tokens = 2;
    std::vector<std::vector<std::byte>> storage;
    std::vector<Partial> partials = all_partials(plan, storage);
    const Plan roomy = with_buffers(plan, partials.size());
    const Outcome in_order = assemble(roomy, partials, 1);
    Plan tight = roomy;
    tight.host.accumulators = ceil_div(5, plan.piece_tokens);
    std::mt19937_64 random(6);
    for (int trial = 0; trial < 12; ++trial) {
      std::shuffle(partials.begin(), partials.end(), random);
      const Outcome shuffled = assemble(tight, partials, 1 + trial % 4);
      BOOST_TEST(shuffled.output == in_order.output);
      BOOST_TEST(shuffled.lse == in_order.lse);
    }
  }
}

namespace {

void check_shares(SmallPlan small) {
  // Keyless chunks, too.
  small.batch = small.ratio = small.kv_heads = 2;
  small.length = 40;
  small.key_length = 20;
  small.causal = true;
  const Plan plan = small_plan(small);
  std::vector<std::vector<std::byte>> storage;
  const std::vector<Partial> partials = all_partials(plan, storage);
  const Outcome expected = assemble(plan, partials, 1);
  for (const int mergers : {1, 2, 5, 20}) {
    const MergeShares shares(plan, mergers);
    Outcome all;
    for (int rank = 0; rank < shares.ranks(); ++rank) {
      const Range chunks = shares.chunks(rank);
      const Plan own = merger_plan(plan, 2, chunks, plan.request.host_budget);
      std::vector<Partial> theirs;
      std::copy_if(partials.begin(), partials.end(), std::back_inserter(theirs),
                   [&](const Partial& partial) { return chunks.contains(partial.key.chunk); });
      const Outcome part = assemble(own, theirs, 2);
      all.output.resize(part.output.size());
      all.lse.resize(part.lse.size());
      for (std::size_t i = 0; i < part.output.size(); ++i) all.output[i] |= part.output[i];
      for (std::size_t i = 0; i < part.lse.size(); ++i) all.lse[i] |= part.lse[i];
    }
    BOOST_TEST(all.output == expected.output);
    BOOST_TEST(all.lse == expected.lse);
    const Plan first = merger_plan(plan, 2, shares.chunks(0), plan.request.host_budget);
    BOOST_CHECK_EXCEPTION(
        assemble(first, {partials.back()}, 1), std::logic_error, [](const std::logic_error& error) {
          return std::string(error.what()).find("another rank") != std::string::npos;
        });
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(shares_of_the_chunks_give_together_the_same_bits) {
  check_shares({.chunks = 13});
  check_shares({.grid = Grid{9, 4}});
}

BOOST_AUTO_TEST_CASE(accumulators_in_a_file_give_the_same_bits) {
  const Plan memory = small_plan({.kv_heads = 2, .length = 64, .chunks = 13});
  std::vector<std::vector<std::byte>> storage;
  const std::vector<Partial> partials = all_partials(memory, storage);
  const Outcome expected = assemble(memory, partials, 2);
  BOOST_TEST(expected.scratch_bytes == 0);

  Plan file = memory;
  file.placement = AccumulatorPlacement::file;
  file.host.accumulators = 4;
  for (const int threads : {1, 2, 4}) {
    const Outcome spilled = assemble(file, partials, threads);
    BOOST_TEST(spilled.scratch_bytes > 0);
    BOOST_TEST(spilled.output == expected.output);
    BOOST_TEST(spilled.lse == expected.lse);
  }
}

BOOST_AUTO_TEST_CASE(rows_without_a_key_end_as_zero) {
  // 40 queries, 8 keys, causal: the first 32 rows see nothing, whole chunks among them.
  const Plan plan = small_plan({.length = 40, .key_length = 8, .causal = true, .chunks = 7});
  std::vector<std::vector<std::byte>> storage;
  const Outcome outcome = assemble(plan, all_partials(plan, storage), 2);
  const auto* rows = reinterpret_cast<const float*>(outcome.output.data());
  const auto* lse = reinterpret_cast<const float*>(outcome.lse.data());
  for (std::int64_t row = 0; row < 40; ++row) {
    const bool keyless = row < 32;
    BOOST_TEST((lse[row] == -std::numeric_limits<float>::infinity()) == keyless);
    for (int i = 0; i < 4; ++i) BOOST_TEST((rows[row * 4 + i] == 0.0f) == keyless);
  }
}

BOOST_AUTO_TEST_CASE(duplicates_are_dropped) {
  const Plan plan = small_plan({.ratio = 2, .length = 40, .chunks = 7});
  std::vector<std::vector<std::byte>> storage;
  std::vector<Partial> partials = all_partials(plan, storage);
  const Outcome expected = assemble(plan, partials, 2);
  const std::size_t once = partials.size();
  for (std::size_t i = 0; i < once; ++i) partials.push_back(partials[i]);
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 8; ++trial) {
    // Merged, being merged and waiting: no more buffers than there are partials.
    const Outcome outcome = assemble(with_buffers(plan, once), partials, 1 + trial % 3);
    BOOST_TEST(outcome.output == expected.output);
    BOOST_TEST(outcome.lse == expected.lse);
    std::shuffle(partials.begin(), partials.end(), random);
  }
}

BOOST_AUTO_TEST_CASE(what_a_chunk_lacks_is_what_was_not_delivered) {
  const Plan plan = small_plan({.length = 40, .chunks = 7});
  std::vector<std::vector<std::byte>> storage;
  const std::vector<Partial> partials = all_partials(plan, storage);
  const HostBuffer memory(plan.host.bytes());
  std::vector<std::byte> rows(
      static_cast<std::size_t>(plan.problem().query_length * plan.problem().head_dim) * 4);
  const auto sink = make_memory_sink(
      {"o", DType::f32, Layout::bshd, 4, 1, plan.problem().query_length, 1, 4}, rows);
  Telemetry telemetry;
  Abort abort;
  Assembler assembler(plan, {*sink, nullptr}, memory.data(), {}, telemetry, abort);
  std::size_t delivered = 0;
  for (const Partial& given : partials) {
    for (std::size_t i = 0; i < partials.size(); ++i) {
      const auto [batch, group, chunk, piece] = partials[i].key;
      const std::int64_t quorum = plan.key(partials[i].subproblem).quorum;
      BOOST_TEST(assembler.lacks(batch, group, chunk, quorum) == (i >= delivered));
    }
    if (++delivered > static_cast<std::size_t>(plan.host.state_buffers)) break;
    Partial partial = given;
    const auto buffer = assembler.wait_buffer();
    partial.buffer = buffer.number;
    assembler.deliver(partial);
  }
  BOOST_TEST(!assembler.lacks(0, 0, 0, plan.division.chunk_count()));
}

BOOST_AUTO_TEST_CASE(a_missing_partial_is_a_failure_and_not_a_hang) {
  const Plan plan = small_plan({});
  std::vector<std::vector<std::byte>> storage;
  std::vector<Partial> partials = all_partials(plan, storage);
  partials.pop_back();
  BOOST_CHECK_THROW(assemble(with_buffers(plan, partials.size()), partials, 2), std::logic_error);
}
