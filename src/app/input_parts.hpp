// What was read of an input, part by part, so that several readers' parts are counted once each.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "stream_cqsa/fingerprint.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Fingerprints of the blocks of a tensor. All ranks of a plan cut a tensor alike, so that a block
/// is known by where it begins. Not thread-safe.
class InputParts {
 public:
  struct Place {
    std::int64_t batch = 0;
    std::int64_t head = 0;
    std::int64_t token = 0;
    friend auto operator<=>(const Place&, const Place&) = default;
  };

  /// Makes the block known. False where it was already.
  bool claim(const Block& block) { return parts_.try_emplace(place_of(block)).second; }
  void set(const Block& block, const Fingerprint& of_block) { parts_[place_of(block)] = of_block; }

  /// Takes over the parts of another reader that are not known here. Returns the first one that
  /// both know and that had other bytes there.
  std::optional<Place> add(const InputParts& other);

  Fingerprint total() const;

  /// For another process, and back. Some 17 characters a part: as many ranks may tell of as many
  /// parts as a file has megabytes, only the checksum is written where a part is as long as the one
  /// before it and follows it. Example, of three parts of 512 vectors and a ragged one:
  /// "@0,0,0,512#c0ffee;@0,0,512,512#1234;5678!1,0;@0,0,1536,100#abc;", the third with one NaN.
  std::string to_text() const;
  static InputParts from_text(std::string_view text);

 private:
  static Place place_of(const Block& block) {
    return {block.batch, block.heads.begin, block.tokens.begin};
  }
  std::map<Place, Fingerprint> parts_;
};

/// What the workers of a run read.
struct ReadInputs {
  Fingerprint query, key, value;
  std::string differing;  ///< where two of them read other bytes from the same place, or empty
};

/// From their reports, of ranks 1 and up, whose "inputs" are taken out: they may be many.
ReadInputs take_inputs(std::vector<nlohmann::json>& reports);

}  // namespace stream_cqsa
