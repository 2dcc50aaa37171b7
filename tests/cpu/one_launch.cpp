#include "one_launch.hpp"

#include <algorithm>
#include <limits>
#include <numbers>
#include <utility>

#include "stream_cqsa/reference.hpp"

namespace stream_cqsa::testing {
namespace {

StridedRows rows_of(const TestTensor& tensor, std::int64_t batch, std::int64_t token,
                    std::int64_t head) {
  const Block whole{0, {0, tensor.desc.tokens}, {0, tensor.desc.heads}};
  const std::int64_t vector = tensor.desc.dim * size_of(storage_type(tensor.desc.dtype));
  StridedRows rows = packed_rows(tensor.data.data(), whole, tensor.desc.layout, vector);
  rows.data +=
      batch * whole.vectors() * vector + token * rows.token_stride + head * rows.head_stride;
  return rows;
}

class Launch {
 public:
  Launch(const Plan& plan, Backend& backend, const TestInput& input, std::int64_t batch,
         HeadGroup group)
      : plan_(plan), backend_(backend), input_(input), batch_(batch), group_(group) {}

  // States of the group, all tokens: [token][query head of the group].
  std::vector<float> run() {
    std::vector<Ticket> loaded;
    for (std::int64_t p = 0; p < plan_.division.chunk_count(); ++p) {
      load(SlotTensor::query, input_.query, p, loaded);
      load(SlotTensor::key, input_.key, p, loaded);
      load(SlotTensor::value, input_.value, p, loaded);
    }
    const Problem& problem = plan_.problem();
    const Ticket computed = backend_.launch(resident_work(plan_, group_), loaded);
    const std::int64_t heads = group_.query_heads(problem).size();
    const std::int64_t rows = problem.query_length * heads;
    std::vector<float> memory(static_cast<std::size_t>(rows * (problem.head_dim + 2)));
    for (std::int64_t p = 0; p < plan_.division.chunk_count(); ++p) {
      const Range queries = plan_.division.chunk(p).queries;
      if (queries.empty()) continue;
      SoftmaxStates all =
          softmax_states_at(reinterpret_cast<std::byte*>(memory.data()), rows, problem.head_dim);
      const std::int64_t first = queries.begin * heads;
      SoftmaxStates part{all.acc + first * problem.head_dim, all.m + first, all.l + first,
                         queries.size() * heads, problem.head_dim};
      copy_out(p, part, computed);
    }
    return memory;
  }

 private:
  // In two pieces, so that offsets within a slot are used: of Q in one copy, of K and V in two.
  void load(SlotTensor which, const TestTensor& tensor, std::int64_t p,
            std::vector<Ticket>& loaded) {
    const bool query = which == SlotTensor::query;
    const Range tokens = query ? plan_.division.chunk(p).queries : plan_.division.chunk(p).keys;
    const Range heads = query ? group_.query_heads(plan_.problem()) : group_.kv_heads();
    const std::int64_t middle = tokens.begin + tokens.size() / 2;
    CopyIn copy;
    copy.tensor = which;
    copy.slot = static_cast<std::int32_t>(p);
    copy.heads = heads.size();
    copy.slot_tokens = tokens.size();
    for (const Range piece : {Range{tokens.begin, middle}, Range{middle, tokens.end}}) {
      copy.rows.push_back({piece.begin - tokens.begin, piece.size(),
                           rows_of(tensor, batch_, piece.begin, heads.begin)});
      if (query) continue;
      loaded.push_back(backend_.copy_in(copy, {}));
      copy.rows.clear();
    }
    if (query) loaded.push_back(backend_.copy_in(copy, {}));
  }

  void copy_out(std::int64_t p, SoftmaxStates into, Ticket computed) {
    CopyOut copy;
    copy.state_slot = static_cast<std::int32_t>(p);
    copy.slot_rows = into.rows;
    copy.into = into;
    backend_.wait(backend_.copy_out(copy, std::vector<Ticket>{computed}));
  }

  const Plan& plan_;
  Backend& backend_;
  const TestInput& input_;
  std::int64_t batch_;
  HeadGroup group_;
};

// Finishes a group's states in fp64: the kernel's error alone is left.
void finish_group(const Problem& problem, std::int64_t batch, HeadGroup group,
                  std::vector<float>& memory, Computed& computed) {
  const Range heads = group.query_heads(problem);
  const SoftmaxStates states =
      softmax_states_at(reinterpret_cast<std::byte*>(memory.data()),
                        problem.query_length * heads.size(), problem.head_dim);
  for (std::int64_t row = 0; row < states.rows; ++row) {
    const std::int64_t token = row / heads.size();
    const std::int64_t head = heads.begin + row % heads.size();
    const std::int64_t to = (batch * problem.query_length + token) * problem.query_heads + head;
    const bool keyless = problem.visible_keys(token) <= 0;
    const double l = states.l[row];
    for (std::int64_t i = 0; i < problem.head_dim; ++i) {
      computed.output[static_cast<std::size_t>(to * problem.head_dim + i)] =
          keyless ? 0.0 : states.acc[row * problem.head_dim + i] / l;
    }
    const std::int64_t lse = (batch * problem.query_heads + head) * problem.query_length + token;
    computed.lse[static_cast<std::size_t>(lse)] =
        std::numbers::ln2 * (states.m[row] + std::log2(l));
  }
}

}  // namespace

Plan resident_plan(const Problem& problem, const Cut& cut, const DeviceTraits& device) {
  PlanRequest request;
  request.problem = problem;
  request.device = device;
  Plan plan{request,        Division(problem, cut.chunks, cut.tile), {}, {}, {}, {}, {}, 0, 0, 0, 0,
            {0, cut.chunks}};
  for (std::int64_t head = 0; head < problem.kv_heads; head += cut.heads_per_group) {
    plan.groups.push_back({head, std::min(cut.heads_per_group, problem.kv_heads - head)});
  }
  std::int64_t queries = 0;
  std::int64_t keys = 0;
  for (std::int64_t p = 0; p < cut.chunks; ++p) {
    queries = std::max(queries, plan.division.chunk(p).queries.size());
    keys = std::max(keys, plan.division.chunk(p).keys.size());
  }
  const std::int64_t vector = problem.head_dim * size_of(storage_type(problem.dtype));
  const std::int64_t query_heads = cut.heads_per_group * problem.query_heads_per_kv_head();
  const std::int64_t alignment = device.slot_alignment;
  plan.device.query_slots = plan.device.kv_slots = plan.device.state_slots = cut.chunks;
  plan.device.query_slot_bytes = round_up(queries * query_heads * vector, alignment);
  plan.device.kv_slot_bytes = 2 * round_up(keys * cut.heads_per_group * vector, alignment);
  plan.device.state_slot_bytes =
      round_up(softmax_state_bytes(queries * query_heads, problem.head_dim), alignment);
  plan.device.workspace_bytes = device.workspace_bytes;
  return plan;
}

WorkList resident_work(const Plan& plan, HeadGroup group) {
  WorkList work;
  work.heads = group;
  for (std::int64_t p = 0; p < plan.division.chunk_count(); ++p) {
    const Range queries = plan.division.chunk(p).queries;
    if (queries.empty()) continue;
    QueryWork query;
    query.slot = query.state_slot = static_cast<std::int32_t>(p);
    query.queries = queries;
    query.first_key = static_cast<std::int64_t>(work.keys.size());
    for (std::int64_t q = 0; q < plan.division.chunk_count(); ++q) {
      const Range keys = plan.division.chunk(q).keys;
      const Liveness liveness = plan.problem().liveness(queries, keys);
      if (liveness == Liveness::dead) continue;
      work.keys.push_back({static_cast<std::int32_t>(q), keys, liveness == Liveness::partial});
    }
    query.key_count = static_cast<std::int64_t>(work.keys.size()) - query.first_key;
    work.queries.push_back(query);
  }
  return work;
}

Computed compute(const Problem& problem, const TestInput& input, const Cut& cut) {
  const auto backend = make_cpu_backend({.threads = cut.threads});
  const Plan plan = resident_plan(problem, cut, backend->traits(problem));
  Telemetry telemetry;
  backend->prepare(plan, telemetry);
  Computed computed;
  const std::int64_t rows = problem.batch * problem.query_length * problem.query_heads;
  computed.output.resize(static_cast<std::size_t>(rows * problem.head_dim));
  computed.lse.resize(static_cast<std::size_t>(rows));
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (const HeadGroup& group : plan.groups) {
      std::vector<float> states = Launch(plan, *backend, input, batch, group).run();
      finish_group(problem, batch, group, states, computed);
      computed.states.insert(computed.states.end(), states.begin(), states.end());
    }
  }
  backend->quiesce();
  computed.scores = backend->scores_computed();
  return computed;
}

double worst_ratio(const Problem& problem, const TestInput& input,
                   const std::vector<double>& output) {
  std::vector<RowIndex> rows;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t token = 0; token < problem.query_length; ++token) {
      for (std::int64_t head = 0; head < problem.query_heads; ++head) {
        rows.push_back({batch, token, head});
      }
    }
  }
  const auto query = block_source(input.query);
  const auto key = block_source(input.key);
  const auto value = block_source(input.value);
  const auto references = reference_rows(problem, *query, *key, *value, rows);
  double worst = 0;
  const auto dim = static_cast<std::size_t>(problem.head_dim);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const RowCheck check =
        check_row(problem, references[row], std::span(output).subspan(row * dim, dim));
    if (!check.ok) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, check.max_error / check.allowed);
  }
  return worst;
}

}  // namespace stream_cqsa::testing
