// Byte counts as people write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace stream_cqsa {

/// Parses "4096", "512MiB", "2 GiB" or "1.5GB": a number and an optional unit, whose case does not
/// matter. B is bytes; KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB powers of 1000.
/// A fraction is rounded down to whole bytes. Throws InputError, naming `what` (an option's name),
/// for anything else and for 2^63 bytes or more.
std::int64_t parse_bytes(std::string_view text, std::string_view what);

/// "512 B", "1.50 GiB": three significant digits or more, in the largest unit that gives at
/// least 1.
std::string format_bytes(std::int64_t bytes);

}  // namespace stream_cqsa
