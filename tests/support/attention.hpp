// Random problems, tensors in memory, and attention by its definition: what engine tests share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "stream_cqsa/files.hpp"
#include "stream_cqsa/problem.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa::testing {

/// A tensor in memory with its elements as doubles beside it, [batch][token][head][dim].
struct TestTensor {
  TensorDesc desc;
  std::vector<std::byte> data;   ///< packed in desc.layout, storage type
  std::vector<double> elements;  ///< exactly what `data` holds

  double at(std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t i) const {
    return elements[static_cast<std::size_t>(
        ((batch * desc.tokens + token) * desc.heads + head) * desc.dim + i)];
  }
};

/// Uniform in [-magnitude, magnitude], rounded to the type.
TestTensor random_tensor(TensorDesc desc, double magnitude, std::mt19937_64& random);

/// Q, K and V of a problem, all in one layout.
struct TestInput {
  TestTensor query, key, value;
};
TestInput random_input(const Problem& problem, Layout layout, double magnitude,
                       std::mt19937_64& random);

/// A small problem of any shape: up to `longest` tokens and a head dimension of up to
/// `largest_dim`, a multiple of `dim_step`; 16-bit or f32 in, f32 out. Some are rows of a longer
/// query sequence.
Problem random_problem(std::mt19937_64& random, std::int64_t longest, std::int64_t largest_dim,
                       std::int64_t dim_step);

/// Sets an element of a tensor (and of its exact elements).
void set_element(TestTensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head,
                 std::int64_t i, double value);

/// O and lse by the definition, two passes in fp64: [batch][token][head][dim],
/// [batch][head][token].
struct Expected {
  std::vector<double> output;
  std::vector<double> lse;
};
Expected brute_force(const Problem& problem, const TestInput& input);

/// A source over the tensor that is read in blocks, as a file is: not resident.
std::unique_ptr<TensorSource> block_source(const TestTensor& tensor);

/// The largest |output - expected| over the finite expected values, or infinity when a value is
/// finite on one side only.
double largest_error(const TensorDesc& desc, const std::vector<std::byte>& output,
                     const std::vector<double>& expected);

}  // namespace stream_cqsa::testing
