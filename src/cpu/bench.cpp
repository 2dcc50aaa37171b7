#include "cpu/bench.hpp"

#include <cblas.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/thread_pool.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

double bench_sgemm_flops(int threads) {
  constexpr int size = 1024;
  constexpr int products = 4;
  constexpr int rounds = 5;
  constexpr auto elements = std::size_t{size} * size;
  openblas_set_num_threads(1);
  ThreadPool pool(available_threads(threads));
  const auto workers = static_cast<std::size_t>(pool.threads());
  const std::vector<float> a(elements, 0.5f);
  const std::vector<float> b(elements, 0.25f);
  std::vector<std::vector<float>> c(workers, std::vector<float>(elements));
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < rounds; ++round) {
    const double begin = now_seconds();
    pool.run([&](int worker) {
      float* to = c[static_cast<std::size_t>(worker)].data();
      for (int i = 0; i < products; ++i) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, size, size, size, 1.0f, a.data(),
                    size, b.data(), size, 0.0f, to, size);
      }
    });
    best = std::min(best, now_seconds() - begin);
  }
  return 2.0 * size * size * size * products * pool.threads() / best;
}

}  // namespace stream_cqsa
