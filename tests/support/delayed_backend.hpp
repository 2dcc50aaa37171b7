// A backend that takes its time, at random, or fails where it is told to.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa::testing {

/// Passes everything on to another backend, after random pauses.
class DelayedBackend : public Backend {
 public:
  DelayedBackend(std::unique_ptr<Backend> inner, std::uint64_t seed)
      : inner_(std::move(inner)), random_(seed) {}

  DeviceTraits traits(const Problem& problem) const override { return inner_->traits(problem); }
  void prepare(const Plan& plan, Telemetry& telemetry) override {
    inner_->prepare(plan, telemetry);
  }
  std::int64_t allocated_bytes() const override { return inner_->allocated_bytes(); }
  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    pause();
    return inner_->copy_in(copy, after);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    pause();
    return inner_->launch(std::move(work), after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    pause();
    return inner_->copy_out(copy, after);
  }
  void wait(Ticket ticket) override {
    pause();
    inner_->wait(ticket);
  }
  void quiesce() noexcept override { inner_->quiesce(); }
  std::uint64_t scores_computed() const override { return inner_->scores_computed(); }

 private:
  void pause() {
    std::uint64_t draw;
    {
      const std::scoped_lock lock(mutex_);
      draw = random_();
    }
    if (draw % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw / 4 % 800));
  }
  std::unique_ptr<Backend> inner_;
  std::mutex mutex_;
  std::mt19937_64 random_;
};

/// Throws from the nth submission of one lane on.
class FailingBackend : public DelayedBackend {
 public:
  FailingBackend(std::unique_ptr<Backend> inner, Lane lane, int submissions)
      : DelayedBackend(std::move(inner), 1), lane_(lane), left_(submissions) {}

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    count(Lane::copy_in);
    return DelayedBackend::copy_in(copy, after);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    count(Lane::compute);
    return DelayedBackend::launch(std::move(work), after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    count(Lane::copy_out);
    return DelayedBackend::copy_out(copy, after);
  }

 private:
  void count(Lane lane) {
    if (lane == lane_ && left_-- <= 0) throw Error("device: injected failure");
  }
  Lane lane_;
  std::atomic<int> left_;
};

}  // namespace stream_cqsa::testing
