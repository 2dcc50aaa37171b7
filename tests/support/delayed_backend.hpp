// A backend that takes its time, at random, or fails where it is told to.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <string>
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
  std::string numerics(const Problem& problem) const override { return inner_->numerics(problem); }
  void prepare(const Plan& plan, Telemetry& telemetry) override {
    inner_->prepare(plan, telemetry);
  }
  std::shared_ptr<void> pin(std::span<std::byte> memory) override { return inner_->pin(memory); }
  std::int64_t allocated_bytes() const override { return inner_->allocated_bytes(); }
  std::int64_t memory_in_use() const override { return inner_->memory_in_use(); }
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
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    pause();
    return inner_->merge(work, after);
  }
  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    pause();
    return inner_->finalise(work, after);
  }
  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    pause();
    return inner_->copy_out_rows(copy, after);
  }
  void wait(Ticket ticket) override {
    pause();
    inner_->wait(ticket);
  }
  void cancel() noexcept override { inner_->cancel(); }
  void quiesce() noexcept override { inner_->quiesce(); }
  std::uint64_t scores_computed() const override { return inner_->scores_computed(); }
  NonFinite output_non_finite() override { return inner_->output_non_finite(); }

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
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    count(Lane::compute);
    return DelayedBackend::merge(work, after);
  }
  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    count(Lane::compute);
    return DelayedBackend::finalise(work, after);
  }
  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    count(Lane::copy_out);
    return DelayedBackend::copy_out_rows(copy, after);
  }

 private:
  void count(Lane lane) {
    if (lane == lane_ && left_-- <= 0) throw Error("device: injected failure");
  }
  Lane lane_;
  std::atomic<int> left_;
};

/// Lets the nth submission of one lane, and what comes after it, fail while it runs: wait() throws.
class LateFailingBackend : public DelayedBackend {
 public:
  LateFailingBackend(std::unique_ptr<Backend> inner, Lane lane, int submissions)
      : DelayedBackend(std::move(inner), 1), lane_(lane), left_(submissions) {}

  Ticket copy_in(const CopyIn& copy, std::span<const Ticket> after) override {
    return mark(DelayedBackend::copy_in(copy, after), copy.subproblem, after);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    const std::int64_t subproblem = work.subproblem;
    return mark(DelayedBackend::launch(std::move(work), after), subproblem, after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    return mark(DelayedBackend::copy_out(copy, after), copy.subproblem, after);
  }
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    return mark(DelayedBackend::merge(work, after), work.subproblem, after);
  }
  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    return mark(DelayedBackend::finalise(work, after), work.subproblem, after);
  }
  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    return mark(DelayedBackend::copy_out_rows(copy, after), copy.subproblem, after);
  }
  void wait(Ticket ticket) override {
    DelayedBackend::wait(ticket);
    const std::scoped_lock lock(mutex_);
    if (failed(ticket)) throw Error(message_);
  }
  /// What wait() throws once something has failed, else nothing.
  std::string message() const {
    const std::scoped_lock lock(mutex_);
    return message_;
  }

 private:
  std::uint64_t& first_failed(Lane lane) { return first_failed_[static_cast<std::size_t>(lane)]; }
  bool failed(Ticket ticket) {
    const std::uint64_t first = first_failed(ticket.lane);
    return first != 0 && ticket.sequence >= first;
  }
  Ticket mark(Ticket ticket, std::int64_t subproblem, std::span<const Ticket> after) {
    const std::scoped_lock lock(mutex_);
    bool fails = failed(ticket);
    for (const Ticket before : after) fails = fails || failed(before);
    if (ticket.lane == lane_ && left_-- == 0) {
      fails = true;
      message_ = "subproblem " + std::to_string(subproblem) + ": injected failure";
    }
    if (fails && first_failed(ticket.lane) == 0) first_failed(ticket.lane) = ticket.sequence;
    return ticket;
  }
  Lane lane_;
  mutable std::mutex mutex_;
  int left_;
  std::array<std::uint64_t, lane_count> first_failed_{};  ///< 0: none
  std::string message_;
};

}  // namespace stream_cqsa::testing
