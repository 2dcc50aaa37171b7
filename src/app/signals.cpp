#include "app/signals.hpp"

#include <unistd.h>

#include <csignal>
#include <initializer_list>
#include <string_view>

#include "io/partial_file.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constinit StopRequest request;

extern "C" void end_by_signal(int number) {
  remove_doomed_files();
  std::raise(number);  // whose handler was reset to the default when this one began
}

extern "C" void ask_for_checkpoint(int) { ++request.checkpoints; }

extern "C" void ask_to_stop(int) {
  request.stop = true;
  if (request.watched) return;
  // Nothing has been computed yet, or all is durable: there is nothing to wait for.
  remove_doomed_files();
  constexpr std::string_view text = "stream-cqsa: stopped; the same command continues\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text.data(), text.size());
  ::_exit(stopped_status);
}

using Handler = void (*)(int);

Handler handler_of(int number) {
  struct sigaction action {};
  return sigaction(number, nullptr, &action) == 0 ? action.sa_handler : SIG_IGN;
}

// Signals that were ignored stay so.
void handle(std::initializer_list<int> numbers, Handler handler, int flags) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  for (const int number : numbers) {
    if (handler_of(number) != SIG_IGN) sigaction(number, &action, nullptr);
  }
}

}  // namespace

StopRequest& stop_request() { return request; }

void clean_up_on_signals() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGUSR1, SIGUSR2, SIGXCPU}) {
    if (handler_of(number) == SIG_DFL)
      handle({number}, end_by_signal, static_cast<int>(SA_RESETHAND | SA_NODEFER));
  }
}

void ignore_signals() { handle({SIGUSR1, SIGINT, SIGTERM, SIGHUP, SIGXCPU}, SIG_IGN, 0); }

void count_requests_for_checkpoints() { handle({SIGUSR1}, ask_for_checkpoint, SA_RESTART); }

void checkpoint_on_signals() {
  count_requests_for_checkpoints();
  handle({SIGINT, SIGTERM, SIGHUP, SIGXCPU}, ask_to_stop, SA_RESTART);
}

}  // namespace stream_cqsa
