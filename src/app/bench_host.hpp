// Rates of the host, for the command `bench`: copies, merges, files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// Of a buffer that is far beyond any cache.
constexpr std::int64_t bench_bytes = std::int64_t{128} << 20;

/// The shortest of several runs, in seconds.
double shortest(const std::function<void()>& body);

/// Runs body(thread) on every thread and waits for all. Throws what the first of them threw.
void on_threads(int threads, const std::function<void(int)>& body);

/// Bytes that `threads` memcpy a second.
double copy_rate(int threads);

/// Bytes of partials of dimension `dim` that `threads` merge a second.
double merge_rate(int threads, std::int64_t dim);

/// Bytes of a synthetic input that `threads` make a second, with its fingerprint.
double generate_rate(int threads);

struct FileRates {
  double write = 0;    ///< bytes a second into a new file beside merging, not synced, fingerprinted
  double rewrite = 0;  ///< of rows whose other heads are staged there, with the last head
  double read = 0;     ///< of the same file, from the page cache where that holds it
  double read_direct =
      0;  ///< the same past the page cache; 0 where the file system has no such way
};

/// Rates of files in `directory`, in which a file of 512 MiB is made and removed, with a run's
/// threads. Rows are written while others are merged, which takes some of the memory's bandwidth;
/// in a run that writing holds up about half of the threads that merge are busy, so half do so
/// here.
FileRates file_rates(const std::filesystem::path& directory, const RunOptions& threads);

}  // namespace stream_cqsa
