// stream-cqsa: exact attention over sequences of any length, under any memory budget.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <string>
#include <string_view>

#include "app/arguments.hpp"
#include "app/commands.hpp"
#include "app/signals.hpp"
#include "mpi/environment.hpp"
#include "stream_cqsa/error.hpp"

namespace {

using stream_cqsa::Arguments;
using stream_cqsa::MpiEnvironment;

struct Command {
  std::string_view name;
  int (*run)(const Arguments&, const MpiEnvironment&);
  std::string_view summary;
};

constexpr std::array commands = {
    Command{"run", stream_cqsa::run_command, "computes attention"},
    Command{"plan", stream_cqsa::plan_command,
            "shows how a run would be divided; computes nothing"},
    Command{"rehearse", stream_cqsa::rehearse_command,
            "computes and checks some subproblems of a run's plan, and predicts the whole"},
    Command{"generate", stream_cqsa::generate_command, "writes synthetic inputs"},
    Command{"verify", stream_cqsa::verify_command, "checks an output against fp64 on sampled rows"},
    Command{"devices", stream_cqsa::devices_command, "says what this machine offers"},
    Command{"bench", stream_cqsa::bench_command, "measures the CPU, files and the whole pipeline"},
};

std::string usage() {
  std::string text = "usage: stream-cqsa COMMAND [OPTION...]\n\ncommands:\n";
  for (const Command& command : commands) {
    text += fmt::format("  {:<10} {}\n", command.name, command.summary);
  }
  return text +
         "\nstream-cqsa COMMAND --help lists a command's options; --version says what this is.\n";
}

int dispatch(const Arguments& arguments, const MpiEnvironment& mpi) {
  const std::string first = arguments.empty() ? "" : arguments.front();
  // A run is shared by all ranks; anything else is the first one's alone.
  const bool helped = std::ranges::find(arguments, "--help") != arguments.end();
  const bool shared = first == "run" && !helped;
  if (mpi.size() > 1 && !mpi.agree(shared)) {
    throw stream_cqsa::InputError(
        "some ranks were started with the command run, and others were not; start all with it");
  }
  if (mpi.rank() > 0 && !shared) return 0;
  if (first == "--version") return stream_cqsa::print_version();
  if (first == "--help" || first == "-h") return fmt::print("{}", usage()), 0;
  for (const Command& command : commands) {
    if (command.name == first) return command.run({arguments.begin() + 1, arguments.end()}, mpi);
  }
  throw stream_cqsa::InputError(
      fmt::format("{}; stream-cqsa --help lists the commands",
                  first.empty() ? "no command given" : "unknown command '" + first + "'"));
}

// Before the options are parsed, which is when MPI has started.
bool names_a_checkpoint(const Arguments& arguments) {
  return std::ranges::any_of(
      arguments, [](const std::string& word) { return word.starts_with("--checkpoint"); });
}

}  // namespace

int main(int argc, char** argv) {
  // A file that reaches the size limit is then an error of the write, with a message.
  std::signal(SIGXFSZ, SIG_IGN);
  const Arguments arguments(argv + 1, argv + argc);
  if (names_a_checkpoint(arguments)) stream_cqsa::count_requests_for_checkpoints();
  stream_cqsa::clean_up_on_signals();
  try {
    const MpiEnvironment mpi(argc, argv);
    try {
      return dispatch(arguments, mpi);
    } catch (const stream_cqsa::InputError& error) {
      if (mpi.rank() == 0) fmt::print(stderr, "stream-cqsa: {}\n", error.what());
      return 2;
    } catch (const stream_cqsa::Resumable& stopped) {
      fmt::print(stderr, "stream-cqsa: {}\n", stopped.what());
      return stream_cqsa::stopped_status;
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "stream-cqsa: {}\n", error.what());
    return 1;
  }
}
