#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

std::string_view name_of(Layout layout) { return layout == Layout::bshd ? "bshd" : "bhsd"; }

std::optional<Layout> parse_layout(std::string_view name) {
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    if (name == name_of(layout)) return layout;
  }
  return std::nullopt;
}

std::vector<std::int64_t> TensorDesc::shape() const {
  std::vector<std::int64_t> extents;
  if (rank == 4) extents.push_back(batch);
  if (rank == 2) {
    extents.push_back(tokens);
  } else if (layout == Layout::bshd) {
    extents.insert(extents.end(), {tokens, heads});
  } else {
    extents.insert(extents.end(), {heads, tokens});
  }
  if (!squeeze_dim) extents.push_back(dim);
  return extents;
}

}  // namespace stream_cqsa
