#include "app/audit.hpp"

#include <cstring>

namespace stream_cqsa {

void AuditedSource::read(const Block& block, std::span<std::byte> into) {
  inner_.read(block, into);
  {
    const std::scoped_lock lock(mutex_);
    if (!seen_.insert({block.batch, block.heads.begin, block.tokens.begin}).second) return;
  }
  const DType dtype = storage_type(desc_.dtype);
  const StageTimer timer(telemetry_, Stage::checksum, static_cast<std::int64_t>(into.size()), -1);
  Fingerprint own;
  own.add(desc_, dtype, block,
          packed_rows(into.data(), block, desc_.layout, desc_.dim * size_of(dtype)));
  const std::scoped_lock lock(mutex_);
  fingerprint_ += own;
}

Fingerprint AuditedSource::fingerprint() const {
  const std::scoped_lock lock(mutex_);
  return fingerprint_;
}

AuditedSink::AuditedSink(TensorSink& inner, std::span<const RowIndex> rows, Telemetry& telemetry)
    : TensorSink(inner.desc()), inner_(inner), telemetry_(telemetry) {
  for (const RowIndex& row : rows) rows_[{row.batch, row.token, row.head}];
}

void AuditedSink::write(const Block& block, std::span<const std::byte> from) {
  inner_.write(block, from);
  watch(block, from);
}

void AuditedSink::watch(const Block& block, std::span<const std::byte> from) {
  const StageTimer timer(telemetry_, Stage::checksum, static_cast<std::int64_t>(from.size()), -1);
  const std::int64_t vector_bytes = desc_.dim * size_of(desc_.dtype);
  fingerprint_.add(desc_, desc_.dtype, block,
                   packed_rows(from.data(), block, Layout::bshd, vector_bytes));
  for (auto& [key, kept] : rows_) {
    const auto [batch, token, head] = key;
    if (batch != block.batch || !block.tokens.contains(token) || !block.heads.contains(head)) {
      continue;
    }
    const std::int64_t vector =
        (token - block.tokens.begin) * block.heads.size() + head - block.heads.begin;
    const std::byte* begin = from.data() + vector * vector_bytes;
    kept.assign(begin, begin + vector_bytes);
  }
}

nlohmann::json AuditedSink::seen() const {
  auto rows = nlohmann::json::array();
  for (const auto& [key, kept] : rows_) {
    if (kept.empty()) continue;
    const auto [batch, token, head] = key;
    std::vector<int> bytes;
    for (const std::byte byte : kept) bytes.push_back(std::to_integer<int>(byte));
    rows.push_back({{"batch", batch}, {"token", token}, {"head", head}, {"bytes", bytes}});
  }
  return {{"checksum", fingerprint_.checksum},
          {"vectors", fingerprint_.vectors},
          {"nan", fingerprint_.non_finite.nan},
          {"infinite", fingerprint_.non_finite.infinite},
          {"rows", rows}};
}

void AuditedSink::add(const nlohmann::json& seen) {
  fingerprint_ += {seen.at("checksum").get<std::uint64_t>(),
                   seen.at("vectors").get<std::int64_t>(),
                   {seen.at("nan").get<std::int64_t>(), seen.at("infinite").get<std::int64_t>()}};
  for (const nlohmann::json& row : seen.at("rows")) {
    auto& kept = rows_[{row.at("batch").get<std::int64_t>(), row.at("token").get<std::int64_t>(),
                        row.at("head").get<std::int64_t>()}];
    kept.clear();
    for (const int byte : row.at("bytes")) kept.push_back(static_cast<std::byte>(byte));
  }
}

std::vector<double> AuditedSink::row(const RowIndex& index) const {
  const auto found = rows_.find({index.batch, index.token, index.head});
  if (found == rows_.end()) return {};
  return to_double(desc_.dtype, found->second);
}

std::vector<double> to_double(DType dtype, std::span<const std::byte> data) {
  const auto element = static_cast<std::size_t>(size_of(dtype));
  std::vector<double> values(data.size() / element);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::byte* at = data.data() + i * element;
    const auto load = [at]<typename T>(T value) {
      return std::memcpy(&value, at, sizeof value), value;
    };
    switch (dtype) {
      case DType::f16:
        values[i] = f16_to_f32(load(std::uint16_t{}));
        break;
      case DType::bf16:
        values[i] = bf16_to_f32(load(std::uint16_t{}));
        break;
      case DType::f32:
        values[i] = load(float{});
        break;
      case DType::f64:
        values[i] = load(double{});
        break;
    }
  }
  return values;
}

}  // namespace stream_cqsa
