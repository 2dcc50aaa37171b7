// Who looks at a StopRequest.
#pragma once

#include <chrono>
#include <cstdint>
#include <utility>

#include "stream_cqsa/checkpoint.hpp"

namespace stream_cqsa {

/// How soon an answer to a signal begins.
inline constexpr std::chrono::milliseconds watch_period(20);

/// Says that a request is watched while this lives.
class Watch {
 public:
  /// With `answered`, checkpoints that were asked for before do not count.
  explicit Watch(StopRequest* request, bool answered = false)
      : request_(request), seen_(request && answered ? request->checkpoints.load() : 0) {
    if (request_) request_->watched = true;
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch() {
    if (request_) request_->watched = false;
  }

  bool stop() const { return request_ && request_->stop_now(); }
  /// Whether a checkpoint was asked for since the last call.
  bool asked() {
    const std::int64_t seen = request_ ? request_->checkpoints.load() : 0;
    return std::exchange(seen_, seen) != seen;
  }

 private:
  StopRequest* request_;
  std::int64_t seen_;
};

}  // namespace stream_cqsa
