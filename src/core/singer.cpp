#include "core/singer.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace stream_cqsa {
namespace {

std::int64_t smallest_prime_factor(std::int64_t n) {
  for (std::int64_t p = 2; p * p <= n; ++p) {
    if (n % p == 0) return p;
  }
  return n;
}

std::vector<std::int64_t> distinct_prime_factors(std::int64_t n) {
  std::vector<std::int64_t> factors;
  while (n > 1) {
    factors.push_back(smallest_prime_factor(n));
    while (n % factors.back() == 0) n /= factors.back();
  }
  return factors;
}

/// Coefficients over GF(p), the constant first.
using Polynomial = std::vector<std::int64_t>;

/// GF(p)[x] modulo the monic polynomial x^degree - tail(x); a field where that is irreducible.
class QuotientRing {
 public:
  QuotientRing(std::int64_t p, Polynomial tail) : p_(p), tail_(std::move(tail)) {}

  Polynomial one() const {
    Polynomial result(tail_.size(), 0);
    result[0] = 1;
    return result;
  }

  Polynomial times_x(Polynomial a) const {
    const std::int64_t top = a.back();
    std::rotate(a.rbegin(), a.rbegin() + 1, a.rend());
    a[0] = 0;
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = (a[i] + top * tail_[i]) % p_;
    return a;
  }

  Polynomial times(const Polynomial& a, const Polynomial& b) const {
    Polynomial result(tail_.size(), 0);
    for (std::size_t i = b.size(); i-- > 0;) {
      result = times_x(std::move(result));
      for (std::size_t j = 0; j < a.size(); ++j) result[j] = (result[j] + b[i] * a[j]) % p_;
    }
    return result;
  }

  Polynomial power(Polynomial base, std::int64_t exponent) const {
    Polynomial result = one();
    for (; exponent > 0; exponent /= 2) {
      if (exponent % 2 == 1) result = times(result, base);
      base = times(base, base);
    }
    return result;
  }

 private:
  std::int64_t p_;
  Polynomial tail_;
};

/// GF(p^degree) in which x generates the multiplicative group; the first such in the order of the
/// tails' values as numbers to the base p.
QuotientRing primitive_field(std::int64_t p, std::int64_t degree, std::int64_t group_order) {
  const std::vector<std::int64_t> factors = distinct_prime_factors(group_order);
  for (std::int64_t value = 1;; ++value) {
    Polynomial tail(degree, 0);
    std::int64_t rest = value;
    for (std::int64_t i = 0; rest > 0; ++i, rest /= p) tail[i] = rest % p;
    const QuotientRing ring(p, tail);
    const Polynomial one = ring.one();
    const Polynomial x = ring.times_x(one);
    // An x of this order has all p^degree - 1 non-zero elements as powers: the ring is a field.
    if (ring.power(x, group_order) != one) continue;
    const bool primitive = std::none_of(factors.begin(), factors.end(), [&](std::int64_t f) {
      return ring.power(x, group_order / f) == one;
    });
    if (primitive) return ring;
  }
}

}  // namespace

bool is_prime_power(std::int64_t q) { return q >= 2 && distinct_prime_factors(q).size() == 1; }

std::vector<std::int32_t> singer_difference_set(std::int64_t q) {
  const std::int64_t p = smallest_prime_factor(q);
  std::int64_t degree = 0;  // of GF(q^3) over GF(p)
  for (std::int64_t power = 1; power < q; power *= p) degree += 3;
  const QuotientRing field = primitive_field(p, degree, q * q * q - 1);

  // The trace a + a^q + a^(q^2) from GF(q^3) to GF(q) is linear over GF(p): given on x^j, it is
  // known everywhere. Its kernel is a plane over GF(q).
  std::vector<Polynomial> trace;
  Polynomial element = field.one();
  for (std::int64_t j = 0; j < degree; ++j, element = field.times_x(std::move(element))) {
    const Polynomial conjugate = field.power(element, q);
    const Polynomial second = field.power(conjugate, q);
    trace.emplace_back(degree);
    for (std::int64_t i = 0; i < degree; ++i) trace[j][i] = element[i] + conjugate[i] + second[i];
  }
  const auto in_kernel = [&](const Polynomial& a) {
    for (std::int64_t i = 0; i < degree; ++i) {
      std::int64_t sum = 0;
      for (std::int64_t j = 0; j < degree; ++j) sum += a[j] * trace[j][i];
      if (sum % p != 0) return false;
    }
    return true;
  };

  // Powers of x below c represent the points of the projective plane over GF(q); those on the
  // line that the kernel is are the difference set.
  std::vector<std::int32_t> residues;
  element = field.one();
  for (std::int32_t i = 0; i < q * q + q + 1; ++i, element = field.times_x(std::move(element))) {
    if (in_kernel(element)) residues.push_back(i);
  }
  const std::int32_t first = residues.front();
  for (std::int32_t& residue : residues) residue -= first;
  return residues;
}

}  // namespace stream_cqsa
