// Input files: which tensors of which, and whether they are read past the page cache.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "app/arguments.hpp"
#include "app/machine.hpp"
#include "app/problem.hpp"

namespace stream_cqsa {

/// --direct-io: yes, no, or nothing for auto. Throws InputError for anything else.
std::optional<bool> direct_option(const std::string& when);

/// Whether the page cache could keep `bytes` of inputs for less than one pass over them: more than
/// half of the machine's available memory, or than `host_budget` bytes of arenas leave of it.
bool outgrows_page_cache(std::int64_t bytes, std::int64_t host_budget, const Machine& machine);

/// Whether a file of `bytes` goes past the page cache, as --direct-io says on this machine, of
/// which arenas take `host_budget` bytes. Throws InputError for an unknown --direct-io.
bool goes_direct(const InputOptions& input, std::int64_t bytes, std::int64_t host_budget);

/// Opens the files of --input, or --query, --key and --value, over MPI I/O, as --direct-io says on
/// a machine of which arenas take `host_budget` bytes: an OpenProblem that lacks the problem.
/// Throws InputError with one line otherwise.
OpenProblem open_input_files(const InputOptions& input, std::int64_t host_budget);

}  // namespace stream_cqsa
