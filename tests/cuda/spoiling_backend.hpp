// A CUDA backend that sends one piece of work to memory that is not there.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "stream_cqsa/cuda_backend.hpp"
#include "support/delayed_backend.hpp"

namespace stream_cqsa::testing {

enum class Call { copy_in, launch, copy_out, merge, finalise, copy_out_rows };

/// Spoils one call of a kind, counted from 1. CUDA refuses a copy when it is submitted; a kernel
/// faults while it runs.
class SpoilingBackend final : public DelayedBackend {
 public:
  SpoilingBackend(Call call, int number)
      : DelayedBackend(make_cuda_backend({}), 1), call_(call), number_(number) {}

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    CopyIn spoilt = copy;
    if (hit(Call::copy_in)) spoilt.slot = far_slot;
    return DelayedBackend::copy_in(spoilt, after);
  }
  // Every kernel writes its states by address; tensor copies take a slot beyond the pool as zeros.
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (hit(Call::launch)) work.queries.front().state_slot = far_slot;
    return DelayedBackend::launch(std::move(work), after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    CopyOut spoilt = copy;
    if (hit(Call::copy_out)) spoilt.state_slot = far_slot;
    return DelayedBackend::copy_out(spoilt, after);
  }
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    MergeWork spoilt = work;
    if (hit(Call::merge)) spoilt.into_slot = far_slot;
    return DelayedBackend::merge(spoilt, after);
  }
  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    FinaliseWork spoilt = work;
    if (hit(Call::finalise)) spoilt.state_slot = far_slot;
    return DelayedBackend::finalise(spoilt, after);
  }
  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    CopyOutRows spoilt = copy;
    if (hit(Call::copy_out_rows)) spoilt.output_slot = far_slot;
    return DelayedBackend::copy_out_rows(spoilt, after);
  }

  /// Whether it came to the spoilt call.
  bool spoilt() const { return calls_ >= number_; }

 private:
  static constexpr std::int32_t far_slot = 1 << 28;  // far beyond the arena

  bool hit(Call call) { return call == call_ && ++calls_ == number_; }
  Call call_;
  int number_;
  std::atomic<int> calls_{0};
};

}  // namespace stream_cqsa::testing
