// What a rehearsal with --checkpoint keeps of the subproblems that it has tried.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "app/rehearsal_findings.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// A file "tried" of one line for each: JSON, and its checksum.
class TriedRecord {
 public:
  /// Opens the record in `directory`, or makes one, and reads it: up to the first line that is torn
  /// or damaged or of another rehearsal, where the file is cut. Throws Error when storage fails.
  TriedRecord(const std::filesystem::path& directory, std::uint64_t identity);

  /// Or null.
  const TriedSubproblem* find(std::int64_t id) const;
  /// Subproblems that it has.
  std::int64_t size() const { return static_cast<std::int64_t>(tried_.size()); }
  /// What was cut off when it was opened.
  std::int64_t dropped_bytes() const { return dropped_bytes_; }

  /// Durable when it returns.
  void add(const Plan& plan, const TriedSubproblem& tried);

 private:
  void read();

  const std::uint64_t identity_;
  std::unique_ptr<File> file_;
  std::uint64_t end_ = 0;  ///< of the sound lines
  std::int64_t dropped_bytes_ = 0;
  std::map<std::int64_t, TriedSubproblem> tried_;
};

}  // namespace stream_cqsa
