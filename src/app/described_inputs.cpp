#include "app/described_inputs.hpp"

#include <fmt/format.h>

namespace stream_cqsa {
namespace {

using nlohmann::json;

json to_json(const TensorDesc& desc) {
  return {{"name", desc.name},
          {"dtype", name_of(desc.dtype)},
          {"layout", name_of(desc.layout)},
          {"rank", desc.rank},
          {"batch", desc.batch},
          {"tokens", desc.tokens},
          {"heads", desc.heads},
          {"dim", desc.dim}};
}

TensorDesc tensor_from(const json& from) {
  TensorDesc desc;
  desc.name = from.at("name").get<std::string>();
  desc.dtype = parse_dtype(from.at("dtype").get<std::string>()).value();
  desc.layout = parse_layout(from.at("layout").get<std::string>()).value();
  desc.rank = from.at("rank").get<int>();
  desc.batch = from.at("batch").get<std::int64_t>();
  desc.tokens = from.at("tokens").get<std::int64_t>();
  desc.heads = from.at("heads").get<std::int64_t>();
  desc.dim = from.at("dim").get<std::int64_t>();
  return desc;
}

}  // namespace

json describe_inputs(const OpenProblem& open) {
  const Problem& problem = open.problem;
  return {{"query", to_json(open.query->desc())},
          {"key", to_json(open.key->desc())},
          {"value", to_json(open.value->desc())},
          {"causal", problem.mask == Mask::causal},
          {"scale", problem.scale},
          {"output_dtype", name_of(problem.output_dtype)},
          {"queries", fmt::format("{}:{}", problem.queries_before,
                                  problem.queries_before + problem.query_length)},
          {"query_sequence", problem.sequence_length()}};
}

DescribedInputs described_inputs(const json& description, Communicator& communicator) {
  AttentionOptions attention;
  attention.causal = description.at("causal").get<bool>();
  attention.scale = description.at("scale").get<double>();
  attention.output_dtype = description.at("output_dtype").get<std::string>();
  attention.queries = description.at("queries").get<std::string>();
  const TensorDesc query = tensor_from(description.at("query"));
  TensorDesc sequence = query;
  sequence.tokens = description.at("query_sequence").get<std::int64_t>();
  const TensorDesc key = tensor_from(description.at("key"));
  const TensorDesc value = tensor_from(description.at("value"));
  return {std::make_unique<RemoteInputs>(query, key, value, communicator),
          problem_of(sequence, key, value, attention)};
}

}  // namespace stream_cqsa
