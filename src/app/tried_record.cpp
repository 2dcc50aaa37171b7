#include "app/tried_record.hpp"

#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "app/text.hpp"
#include "engine/checksum.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

std::string checksum_of(const json& tried, std::uint64_t identity) {
  const std::string text = tried.dump();
  return hexadecimal(checksum(std::as_bytes(std::span(text)), identity));
}

// Nothing where the line is not sound.
std::optional<TriedSubproblem> tried_of(std::string_view line, std::uint64_t identity) {
  const json entry = json::parse(line, nullptr, false);
  if (!entry.is_object() || !entry.contains("tried")) return std::nullopt;
  if (entry.value("checksum", json()) != checksum_of(entry["tried"], identity)) return std::nullopt;
  return read_tried(entry["tried"]);
}

}  // namespace

TriedRecord::TriedRecord(const std::filesystem::path& directory, std::uint64_t identity)
    : identity_(identity), file_(open_posix_file(directory / "tried", FileMode::update)) {
  read();
}

void TriedRecord::read() {
  std::string text(file_->size(), '\0');
  file_->read_at(0, std::as_writable_bytes(std::span(text)));
  for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    auto tried = tried_of(std::string_view(text).substr(begin, end - begin), identity_);
    if (!tried) break;
    tried_.insert_or_assign(tried->id, std::move(*tried));
    end_ = end + 1;
  }
  dropped_bytes_ = static_cast<std::int64_t>(text.size() - end_);
  if (dropped_bytes_ > 0) file_->resize(end_);
}

const TriedSubproblem* TriedRecord::find(std::int64_t id) const {
  const auto found = tried_.find(id);
  return found == tried_.end() ? nullptr : &found->second;
}

void TriedRecord::add(const Plan& plan, const TriedSubproblem& tried) {
  const json entry = to_json(plan, tried);
  const std::string line =
      json{{"checksum", checksum_of(entry, identity_)}, {"tried", entry}}.dump() + "\n";
  file_->write_at(end_, std::as_bytes(std::span(line)));
  file_->sync();
  end_ += line.size();
  tried_.insert_or_assign(tried.id, tried);
}

}  // namespace stream_cqsa
