#include "engine/journal.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

#include "engine/checksum.hpp"
#include "io/partial_file.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {
namespace {

constexpr std::uint64_t magic = 0x4c4e524a41535143;  // "CQSAJRNL"
constexpr std::uint64_t format_version = 2;
constexpr std::uint64_t header_seed = 1;
constexpr std::size_t header_words = 4;
constexpr std::size_t record_words = 13;
constexpr std::size_t word_bytes = 8;
constexpr std::size_t record_bytes = record_words * word_bytes;
constexpr std::size_t records_at_once = 8192;

using Header = std::array<std::uint64_t, header_words>;
using Words = std::array<std::uint64_t, record_words>;
using Bytes = std::vector<std::byte>;

void store(std::uint64_t word, std::byte* into) {
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  std::memcpy(into, &word, word_bytes);
}

std::uint64_t load(const std::byte* from) {
  std::uint64_t word;
  std::memcpy(&word, from, word_bytes);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  return word;
}

template <std::size_t count>
void append_words(const std::array<std::uint64_t, count>& words, Bytes& bytes) {
  bytes.resize(bytes.size() + count * word_bytes);
  std::byte* at = bytes.data() + bytes.size() - count * word_bytes;
  for (const std::uint64_t word : words) store(word, std::exchange(at, at + word_bytes));
}

// The checksum of all words but the last, which is its place.
template <std::size_t count>
std::uint64_t checksum_of(const std::array<std::uint64_t, count>& words, std::uint64_t seed) {
  Bytes bytes;
  append_words(words, bytes);
  return checksum(std::span(bytes).first((count - 1) * word_bytes), seed);
}

Bytes header_bytes(std::uint64_t identity) {
  Header header = {magic, format_version, identity, 0};
  header.back() = checksum_of(header, header_seed);
  Bytes bytes;
  append_words(header, bytes);
  return bytes;
}

Words words_of(const JournalRecord& record, std::uint64_t identity) {
  const auto word = [](std::int64_t number) { return static_cast<std::uint64_t>(number); };
  const auto& [batch, group, chunk, piece] = record.key;
  Words words = {static_cast<std::uint64_t>(record.kind),
                 word(batch),
                 word(group),
                 word(chunk),
                 word(piece),
                 word(record.merged),
                 word(record.scores),
                 word(record.slot),
                 record.data,
                 record.lse,
                 word(record.non_finite.nan),
                 word(record.non_finite.infinite),
                 0};
  words.back() = checksum_of(words, identity);
  return words;
}

std::optional<JournalRecord> record_at(const std::byte* from, std::uint64_t identity) {
  Words words;
  for (std::uint64_t& word : words) word = load(std::exchange(from, from + word_bytes));
  if (words.back() != checksum_of(words, identity)) return std::nullopt;
  const auto number = [&](std::size_t i) { return static_cast<std::int64_t>(words[i]); };
  return JournalRecord{static_cast<JournalRecord::Kind>(words[0]),
                       {number(1), number(2), number(3), number(4)},
                       number(5),
                       number(6),
                       number(7),
                       words[8],
                       words[9],
                       {number(10), number(11)}};
}

}  // namespace

std::uint64_t data_seed(const PieceKey& key, std::int64_t merged) {
  const auto word = [](std::int64_t number) { return static_cast<std::uint64_t>(number); };
  return checksum({word(key.batch), word(key.group), word(key.chunk), word(key.piece)},
                  word(merged));
}

Journal::Journal(std::filesystem::path path, std::uint64_t identity)
    : path_(std::move(path)), identity_(identity) {
  if (!std::filesystem::exists(path_)) {
    write_new({});
    return;
  }
  file_ = open_posix_file(path_, FileMode::update);
  read();
}

std::int64_t Journal::dropped_records() const {
  return ceil_div(dropped_bytes_, static_cast<std::int64_t>(record_bytes));
}

void Journal::read() {
  const std::uint64_t size = file_->size();
  const Bytes expected = header_bytes(identity_);
  Bytes found(std::min<std::uint64_t>(size, expected.size()));
  file_->read_at(0, found);
  damaged_header_ = found != expected;
  if (damaged_header_ && found.size() == expected.size()) {
    const std::uint64_t identity = load(found.data() + 2 * word_bytes);
    if (found == header_bytes(identity)) {
      throw InputError(
          fmt::format("{}: is the journal of another run (other plan, inputs or version); use "
                      "another directory",
                      path_.string()));
    }
  }
  std::uint64_t at = expected.size();
  Bytes block;
  for (bool sound = true; sound && at + record_bytes <= size;) {
    block.resize(std::min<std::uint64_t>(records_at_once, (size - at) / record_bytes) *
                 record_bytes);
    file_->read_at(at, block);
    for (std::size_t offset = 0; offset < block.size(); offset += record_bytes) {
      const auto record = record_at(block.data() + offset, identity_);
      sound = record.has_value();
      if (!sound) break;
      records_.push_back(*record);
      at += record_bytes;
    }
  }
  count_ = static_cast<std::int64_t>(records_.size());
  if (size > at) {
    dropped_bytes_ = static_cast<std::int64_t>(size - at);
    file_->resize(at);
  }
  if (damaged_header_) file_->write_at(0, expected);
}

void Journal::append(std::span<const JournalRecord> records) {
  if (records.empty()) return;
  Bytes bytes;
  bytes.reserve(records.size() * record_bytes);
  for (const JournalRecord& record : records) append_words(words_of(record, identity_), bytes);
  file_->write_at(header_words * word_bytes + static_cast<std::uint64_t>(count_) * record_bytes,
                  bytes);
  file_->sync();
  count_ += static_cast<std::int64_t>(records.size());
  bytes_written_ += static_cast<std::int64_t>(bytes.size());
}

void Journal::replace(std::span<const JournalRecord> records) { write_new(records); }

void Journal::write_new(std::span<const JournalRecord> records) {
  Bytes bytes = header_bytes(identity_);
  for (const JournalRecord& record : records) append_words(words_of(record, identity_), bytes);
  PartialFile file(path_, open_posix_file);
  file.file().write_at(0, bytes);
  file.commit();
  file_ = open_posix_file(path_, FileMode::update);
  count_ = static_cast<std::int64_t>(records.size());
  bytes_written_ += static_cast<std::int64_t>(bytes.size());
}

}  // namespace stream_cqsa
