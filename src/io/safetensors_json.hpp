// The JSON inside a .safetensors header.
#pragma once

#include <string_view>
#include <vector>

#include "io/safetensors_header.hpp"

namespace stream_cqsa {

/// The tensors that `json` lists, in its order, checked for form alone. Uses memory in proportion
/// to the text. Throws InputError when it is not JSON or not of the format's form.
std::vector<SafetensorsEntry> parse_safetensors_json(std::string_view json);

}  // namespace stream_cqsa
