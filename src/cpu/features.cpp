#include "cpu/features.hpp"

#include <cblas.h>
#include <fmt/format.h>
#include <hwy/targets.h>

#include <string_view>

namespace stream_cqsa {

std::string cpu_vector_target() {
  // Targets are bits, better ones lower.
  const auto supported = hwy::SupportedTargets();
  return hwy::TargetName(supported & -supported);
}

std::string cpu_blas_config() {
  const std::string_view config = openblas_get_config();
  return fmt::format("{} on {}", config.substr(0, config.find(' ', config.find(' ') + 1)),
                     openblas_get_corename());
}

}  // namespace stream_cqsa
