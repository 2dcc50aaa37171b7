// Some token rows of another tensor.
#include <fmt/format.h>

#include <memory>
#include <utility>

#include "io/blocks.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {
namespace {

TensorDesc part_of(TensorDesc desc, Range tokens) {
  if (tokens.begin < 0 || tokens.empty() || tokens.end > desc.tokens) {
    throw InputError(fmt::format("{}: no rows [{}, {}) in a tensor of {} tokens", desc.name,
                                 tokens.begin, tokens.end, desc.tokens));
  }
  desc.tokens = tokens.size();
  return desc;
}

class RowSource final : public TensorSource {
 public:
  RowSource(std::unique_ptr<TensorSource> whole, Range tokens)
      : TensorSource(part_of(whole->desc(), tokens)),
        whole_(std::move(whole)),
        first_(tokens.begin) {}

  void read(const Block& block, std::span<std::byte> into) override {
    check_read(desc_, block, into.size());  // the whole tensor has rows beside these
    whole_->read(in_whole(block), into);
  }

  std::optional<StridedRows> resident(const Block& block) const override {
    return whole_->resident(in_whole(block));
  }

 private:
  Block in_whole(const Block& block) const {
    return {block.batch, {block.tokens.begin + first_, block.tokens.end + first_}, block.heads};
  }

  std::unique_ptr<TensorSource> whole_;
  std::int64_t first_;
};

}  // namespace

std::unique_ptr<TensorSource> make_row_source(std::unique_ptr<TensorSource> whole, Range tokens) {
  return std::make_unique<RowSource>(std::move(whole), tokens);
}

}  // namespace stream_cqsa
