#include "app/input_files.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "mpi/file.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

OpenProblem open_files(const InputOptions& input, const FileOpener& open, InputKind kind) {
  const Layout layout = layout_option(input.layout);
  const auto path = [&](const std::string& own) { return input.input.empty() ? own : input.input; };
  OpenProblem files;
  files.query = open_tensor(path(input.query), input.query_name, layout, open);
  files.key = open_tensor(path(input.key), input.key_name, layout, open);
  files.value = open_tensor(path(input.value), input.value_name, layout, open);
  files.inputs = kind;
  return files;
}

}  // namespace

std::optional<bool> direct_option(const std::string& when) {
  if (when.empty() || when == "auto") return std::nullopt;
  if (when == "yes" || when == "no") return when == "yes";
  throw InputError(fmt::format("--direct-io {}: unknown; use auto, yes or no", when));
}

bool outgrows_page_cache(std::int64_t bytes, std::int64_t host_budget, const Machine& machine) {
  const std::int64_t available = machine.available_memory;
  return bytes > std::min(available / 2, std::max<std::int64_t>(available - host_budget, 0));
}

bool goes_direct(const InputOptions& input, std::int64_t bytes, std::int64_t host_budget) {
  const std::optional<bool> wanted = direct_option(input.direct_io);
  return wanted ? *wanted : outgrows_page_cache(bytes, host_budget, this_machine());
}

OpenProblem open_input_files(const InputOptions& input, std::int64_t host_budget) {
  const std::optional<bool> wanted = direct_option(input.direct_io);
  if (!wanted || !*wanted) {
    OpenProblem files = open_files(input, open_mpi_file, InputKind::files);
    const std::int64_t bytes =
        files.query->desc().bytes() + files.key->desc().bytes() + files.value->desc().bytes();
    if (wanted || !outgrows_page_cache(bytes, host_budget, this_machine())) return files;
  }
  const auto refused = std::make_shared<std::atomic<bool>>(false);
  const auto direct = direct_opener(open_mpi_file, [refused](const std::string& line) {
    *refused = true;
    fmt::print(stderr, "stream-cqsa: {}\n", line);
  });
  OpenProblem files = open_files(input, direct, InputKind::direct_files);
  if (*refused) files.inputs = InputKind::files;
  return files;
}

}  // namespace stream_cqsa
