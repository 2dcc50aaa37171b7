// Offsets beyond 2^31 elements in every tensor, in files' terms and in one slot of the device.
#define BOOST_TEST_MODULE cuda_large
#include <array>
#include <boost/test/unit_test.hpp>
#include <cstdio>
#include <vector>

#include "stream_cqsa/cuda_backend.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/reference.hpp"
#include "stream_cqsa/synthetic.hpp"
#include "support/needs_device.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

/// Keeps some rows of what is written.
class RowSink final : public TensorSink {
 public:
  RowSink(TensorDesc desc, std::span<const RowIndex> rows)
      : TensorSink(std::move(desc)), rows_(rows.begin(), rows.end()), values_(rows.size()) {}

  void write(const Block& block, std::span<const std::byte> from) override {
    const auto* elements = reinterpret_cast<const float*>(from.data());
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const RowIndex& row = rows_[i];
      if (row.batch != block.batch || row.token < block.tokens.begin ||
          row.token >= block.tokens.end || row.head < block.heads.begin ||
          row.head >= block.heads.end) {
        continue;
      }
      const std::int64_t vector =
          (row.token - block.tokens.begin) * block.heads.size() + row.head - block.heads.begin;
      values_[i].assign(elements + vector * desc().dim, elements + (vector + 1) * desc().dim);
    }
  }
  void commit() override {}
  const std::vector<double>& values(std::size_t i) const { return values_[i]; }

 private:
  std::vector<RowIndex> rows_;
  std::vector<std::vector<double>> values_;
};

}  // namespace

BOOST_AUTO_TEST_CASE(more_than_2_to_the_31_elements_in_one_slot) {
  Problem problem;
  problem.query_heads = problem.kv_heads = 2048;
  problem.query_length = problem.key_length = 16400;
  problem.head_dim = 64;
  problem.dtype = DType::f16;
  problem.mask = Mask::causal;
  problem.scale = default_scale(problem.head_dim);
  const auto backend = make_cuda_backend({});
  PlanRequest request;
  request.problem = problem;
  request.device = backend->traits(problem);
  request.device_budget = cuda_free_memory(0) / 10 * 9;
  request.host_budget = std::int64_t{2} << 30;
  request.chunks = 1;
  request.heads_per_group = problem.kv_heads;
  if (request.device_budget < std::int64_t{34} << 30) {
    std::fputs("a device with 34 GiB free is needed: skipped\n", stderr);
    std::_Exit(NeedsDevice::skipped);
  }
  const Plan plan = make_plan(request);
  TensorDesc desc{"synthetic", problem.dtype,        Layout::bshd,        4,
                  1,           problem.query_length, problem.query_heads, problem.head_dim};
  BOOST_TEST(desc.elements() > std::int64_t{1} << 31);
  const auto query = make_synthetic_source(desc, 1, 0), key = make_synthetic_source(desc, 1, 1),
             value = make_synthetic_source(desc, 1, 2);
  desc.dtype = problem.output_dtype;
  const std::array<RowIndex, 4> rows = {
      {{0, 0, 0}, {0, 16399, 2047}, {0, 16390, 1}, {0, 8200, 1024}}};
  RowSink sink(desc, rows);
  Telemetry telemetry;
  RunOptions options;
  options.read_threads = 12;
  options.merge_threads = 4;
  run(plan, {*query, *key, *value}, {sink, nullptr}, *backend, options, telemetry);
  const auto references = reference_rows(problem, *query, *key, *value, rows);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    BOOST_TEST_REQUIRE(sink.values(i).size() == 64u);
    const RowCheck check = check_row(problem, references[i], sink.values(i));
    BOOST_TEST((check.ok && check.comparable()), "row " << i << ": error " << check.max_error);
  }
}
