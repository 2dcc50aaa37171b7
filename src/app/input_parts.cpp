#include "app/input_parts.hpp"

#include <fmt/format.h>

#include <charconv>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

using nlohmann::json;

std::optional<InputParts::Place> InputParts::add(const InputParts& other) {
  std::optional<Place> differing;
  for (const auto& [place, fingerprint] : other.parts_) {
    const auto [known, is_new] = parts_.try_emplace(place, fingerprint);
    if (!is_new && known->second != fingerprint && !differing) differing = place;
  }
  return differing;
}

Fingerprint InputParts::total() const {
  Fingerprint total;
  for (const auto& [place, fingerprint] : parts_) total += fingerprint;
  return total;
}

namespace {

/// Where the next part most likely is: as far from the last one as that from the one before it, and
/// as large.
struct Expected {
  InputParts::Place place;
  std::int64_t vectors = 0;

  void advance(const InputParts::Place& part, std::int64_t of_part) {
    const bool same_row = part.batch == last_.batch && part.head == last_.head;
    const std::int64_t step = same_row ? part.token - last_.token : 0;
    last_ = place = part;
    place.token += step;
    vectors = of_part;
  }

 private:
  InputParts::Place last_;
};

/// Takes numbers and the marks between them off the front of a text.
class Numbers {
 public:
  explicit Numbers(std::string_view text) : text_(text) {}
  bool empty() const { return text_.empty(); }
  bool skip(char mark) {
    const bool found = text_.starts_with(mark);
    text_.remove_prefix(found ? 1 : 0);
    return found;
  }
  template <typename T>
  T next(int base = 10) {
    T value = 0;
    const auto [end, failed] =
        std::from_chars(text_.data(), text_.data() + text_.size(), value, base);
    if (failed != std::errc()) throw Error("a rank's report of what it read is damaged");
    text_.remove_prefix(static_cast<std::size_t>(end - text_.data()));
    return value;
  }
  std::int64_t after(char separator) {
    skip(separator);
    return next<std::int64_t>();
  }

 private:
  std::string_view text_;
};

}  // namespace

std::string InputParts::to_text() const {
  std::string text;
  Expected expected;
  for (const auto& [place, fingerprint] : parts_) {
    const auto& [checksum, vectors, non_finite] = fingerprint;
    if (place != expected.place || vectors != expected.vectors)
      text += fmt::format("@{},{},{},{}#", place.batch, place.head, place.token, vectors);
    text += fmt::format("{:x}", checksum);
    if (non_finite.nan + non_finite.infinite > 0)
      text += fmt::format("!{},{}", non_finite.nan, non_finite.infinite);
    text += ';';
    expected.advance(place, vectors);
  }
  return text;
}

InputParts InputParts::from_text(std::string_view text) {
  InputParts parts;
  Expected expected;
  for (Numbers numbers(text); !numbers.empty(); numbers.skip(';')) {
    Place place = expected.place;
    Fingerprint fingerprint;
    fingerprint.vectors = expected.vectors;
    if (numbers.skip('@')) {
      place.batch = numbers.next<std::int64_t>();
      place.head = numbers.after(',');
      place.token = numbers.after(',');
      fingerprint.vectors = numbers.after(',');
      numbers.skip('#');
    }
    fingerprint.checksum = numbers.next<std::uint64_t>(16);
    if (numbers.skip('!')) {
      fingerprint.non_finite.nan = numbers.next<std::int64_t>();
      fingerprint.non_finite.infinite = numbers.after(',');
    }
    parts.parts_[place] = fingerprint;
    expected.advance(place, fingerprint.vectors);
  }
  return parts;
}

ReadInputs take_inputs(std::vector<json>& reports) {
  ReadInputs read;
  const auto take = [&](const char* tensor, Fingerprint& total) {
    InputParts all;
    for (std::size_t i = 0; i < reports.size(); ++i) {
      const auto inputs = reports[i].find("inputs");
      if (inputs == reports[i].end() || !inputs->contains(tensor)) continue;
      const auto differing = all.add(InputParts::from_text(inputs->at(tensor).get<std::string>()));
      inputs->erase(tensor);
      if (!differing || !read.differing.empty()) continue;
      read.differing = fmt::format(
          "rank {} read another {} than the ranks before it, at batch {}, token {}, head {}: the "
          "files must be the same everywhere",
          i + 1, tensor, differing->batch, differing->token, differing->head);
    }
    total = all.total();
  };
  take("query", read.query);
  take("key", read.key);
  take("value", read.value);
  for (json& report : reports) report.erase("inputs");
  return read;
}

}  // namespace stream_cqsa
