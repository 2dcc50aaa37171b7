// JSON as text.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace stream_cqsa {

/// For what may hold names of files, which may be any bytes: those that are no UTF-8 are replaced.
/// In one line, or indented by `indent`.
template <class Json>
std::string json_text(const Json& value, int indent = -1) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace stream_cqsa
