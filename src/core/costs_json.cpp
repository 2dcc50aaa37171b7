#include <fmt/format.h>

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "stream_cqsa/costs.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

using Json = nlohmann::ordered_json;  // in the order that people read

constexpr int version = 1;

// Each rate by its name in the file.
constexpr std::array<std::pair<const char*, double Costs::*>, 11> rates = {{
    {"copy_in_bytes_per_second", &Costs::copy_in},
    {"copy_out_bytes_per_second", &Costs::copy_out},
    {"device_merge_bytes_per_second", &Costs::device_merge},
    {"merge_bytes_per_second", &Costs::merge},
    {"read_bytes_per_second", &Costs::read},
    {"read_direct_bytes_per_second", &Costs::read_direct},
    {"generate_bytes_per_second", &Costs::generate},
    {"write_bytes_per_second", &Costs::write},
    {"rewrite_bytes_per_second", &Costs::rewrite},
    {"receive_bytes_per_second", &Costs::receive},
    {"start_seconds", &Costs::start_seconds},
}};

// Throws InputError unless it is there and a number from `least` to `most`.
double number(const Json& json, const char* name, double least, double most) {
  const auto at = json.find(name);
  const double value = at != json.end() && at->is_number() ? at->get<double>() : NAN;
  if (value >= least && value <= most) return value;
  throw InputError(fmt::format("'{}' is not a number from {} to {}", name, least, most));
}

// Of something a second. What is slower or faster is no machine of ours, and not to be divided by.
double rate_of(const Json& json, const char* name) { return number(json, name, 1, 1e20); }
double seconds_of(const Json& json, const char* name) { return number(json, name, 0, 1e6); }

std::string text(const Json& json, const char* name) {
  const auto at = json.find(name);
  if (at == json.end() || !at->is_string()) throw InputError(fmt::format("'{}' is no text", name));
  return at->get<std::string>();
}

KernelCost read_kernel(const Json& json) {
  const auto dtype = parse_dtype(text(json, "dtype"));
  const std::string mask = text(json, "mask");
  if (!dtype || (mask != "none" && mask != "causal")) {
    throw InputError("a kernel's 'dtype' or 'mask' is unknown");
  }
  KernelCost kernel;
  kernel.head_dim = static_cast<std::int64_t>(number(json, "head_dim", 1, 65536));
  kernel.dtype = *dtype;
  kernel.mask = mask == "causal" ? Mask::causal : Mask::none;
  kernel.flop_per_second = rate_of(json, "flop_per_second");
  kernel.burst_flop_per_second = rate_of(json, "burst_flop_per_second");
  kernel.launch_seconds = seconds_of(json, "launch_seconds");
  return kernel;
}

Costs read_costs(const Json& json) {
  if (!json.is_object() || json.value("version", 0) != version) {
    throw InputError(fmt::format("is not version {}", version));
  }
  Costs costs;
  costs.measured = true;
  costs.device = text(json, "device");
  for (const auto& [name, rate] : rates) {
    const bool none = (rate == &Costs::device_merge && json.value(name, 1.0) == 0) ||
                      (rate == &Costs::read_direct && json.value(name, 0.0) == 0);
    costs.*rate = rate == &Costs::start_seconds ? seconds_of(json, name)
                  : none                        ? 0
                                                : rate_of(json, name);
  }
  const auto kernels = json.find("kernels");
  if (kernels == json.end() || !kernels->is_array() || kernels->empty()) {
    throw InputError("has no 'kernels'");
  }
  for (const Json& kernel : *kernels) costs.kernels.push_back(read_kernel(kernel));
  return costs;
}

}  // namespace

std::string to_json_text(const Costs& costs) {
  Json json = {{"version", version}, {"device", costs.device}};
  for (const auto& [name, rate] : rates) json[name] = costs.*rate;
  Json kernels = Json::array();
  for (const KernelCost& kernel : costs.kernels) {
    kernels.push_back({{"head_dim", kernel.head_dim},
                       {"dtype", name_of(kernel.dtype)},
                       {"mask", kernel.mask == Mask::causal ? "causal" : "none"},
                       {"flop_per_second", kernel.flop_per_second},
                       {"burst_flop_per_second", kernel.burst_flop_per_second},
                       {"launch_seconds", kernel.launch_seconds}});
  }
  json["kernels"] = std::move(kernels);
  return json.dump(1) + "\n";
}

Costs costs_from_json(const std::string& text, const std::string& name) {
  try {
    return read_costs(Json::parse(text));
  } catch (const Json::exception&) {
    throw InputError(fmt::format("{}: is not JSON; bench --save writes it anew", name));
  } catch (const InputError& error) {
    throw InputError(fmt::format("{}: {}; bench --save writes it anew", name, error.what()));
  }
}

}  // namespace stream_cqsa
