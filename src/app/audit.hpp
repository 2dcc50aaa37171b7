// Sources and sinks that watch what passes through them.
#pragma once

#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <tuple>
#include <vector>

#include "stream_cqsa/fingerprint.hpp"
#include "stream_cqsa/reference.hpp"
#include "stream_cqsa/telemetry.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Fingerprints each block when it is first read, which counts as Stage::checksum.
class AuditedSource : public TensorSource {
 public:
  AuditedSource(TensorSource& inner, Telemetry& telemetry)
      : TensorSource(inner.desc()), inner_(inner), telemetry_(telemetry) {}

  void read(const Block& block, std::span<std::byte> into) override;
  std::optional<StridedRows> resident(const Block& block) const override {
    return inner_.resident(block);
  }
  Fingerprint fingerprint() const;

 private:
  TensorSource& inner_;
  Telemetry& telemetry_;
  mutable std::mutex mutex_;
  std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> seen_;  // batch, head, token
  Fingerprint fingerprint_;
};

/// Fingerprints what is written, which counts as Stage::checksum, and keeps copies of chosen rows.
class AuditedSink : public TensorSink {
 public:
  AuditedSink(TensorSink& inner, std::span<const RowIndex> rows, Telemetry& telemetry);

  void write(const Block& block, std::span<const std::byte> from) override;
  void commit() override { inner_.commit(); }
  void read(const Block& block, std::span<std::byte> into) override { inner_.read(block, into); }
  void sync() override { inner_.sync(); }
  /// Counts as if it had been written now.
  void restore(const Block& block, std::span<const std::byte> from) override { watch(block, from); }

  const Fingerprint& fingerprint() const { return fingerprint_; }
  /// What was written and which chosen rows, exactly, for another process.
  nlohmann::json seen() const;
  /// The same of another process counts as if it had been written here.
  void add(const nlohmann::json& seen);
  /// A chosen row as it was written, [dim]; empty if it was not.
  std::vector<double> row(const RowIndex& index) const;

 private:
  void watch(const Block& block, std::span<const std::byte> from);

  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // batch, token, head
  TensorSink& inner_;
  Telemetry& telemetry_;
  std::map<Key, std::vector<std::byte>> rows_;
  Fingerprint fingerprint_;
};

/// The elements of `data`, exactly.
std::vector<double> to_double(DType dtype, std::span<const std::byte> data);

}  // namespace stream_cqsa
