#include "stream_cqsa/difference_cover.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "core/difference_cover_table.hpp"
#include "core/singer.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {
namespace {

/// How the cover of one modulus is made, and its size.
struct Recipe {
  enum class Kind { table, singer, wichmann, product };
  Kind kind = Kind::table;
  std::int32_t size = 0;
  std::int32_t first = 0;   ///< singer: q; wichmann: r; product: the first factor
  std::int32_t second = 0;  ///< wichmann: s; product: the second factor
};

using Recipes = std::vector<Recipe>;  // indexed by modulus; [0] is unused

// Wichmann's ruler W(r, s) has 4r + s + 3 marks; every distance from 1 to its length is one
// between two marks, so it covers Z_c for c <= 2 * length + 1.
std::int64_t wichmann_length(std::int64_t r, std::int64_t s) {
  return 4 * r * (r + s + 2) + 3 * (s + 1);
}

std::vector<std::int32_t> wichmann_ruler(std::int32_t r, std::int32_t s) {
  std::vector<std::int32_t> marks = {0};
  const auto append = [&](std::int32_t gap, std::int32_t count) {
    for (std::int32_t i = 0; i < count; ++i) marks.push_back(marks.back() + gap);
  };
  append(1, r);
  append(r + 1, 1);
  append(2 * r + 1, r);
  append(4 * r + 3, s);
  append(2 * r + 2, r + 1);
  append(1, r);
  return marks;
}

// The ruler with the fewest marks for c, of those the one with the smallest r.
Recipe best_wichmann(std::int64_t c) {
  Recipe best;
  for (std::int32_t r = 0; best.size == 0 || 4 * r + 3 < best.size; ++r) {
    const std::int64_t missing = std::max<std::int64_t>(0, c / 2 - wichmann_length(r, 0));
    const auto s = static_cast<std::int32_t>(ceil_div(missing, 4 * r + 3));
    const std::int32_t marks = 4 * r + s + 3;
    if (best.size == 0 || marks < best.size) best = {Recipe::Kind::wichmann, marks, r, s};
  }
  return best;
}

// Replaces recipes by products where those make a smaller cover. By ascending larger factor, so
// that every factor's own recipe is final when it is used.
void improve_by_products(Recipes& recipes) {
  for (std::int32_t second = 2; second <= max_modulus / 2; ++second) {
    for (std::int32_t first = 2; first <= std::min<std::int64_t>(second, max_modulus / second);
         ++first) {
      Recipe& recipe = recipes[first * second];
      const std::int32_t size = recipes[first].size * recipes[second].size;
      if (size < recipe.size) recipe = {Recipe::Kind::product, size, first, second};
    }
  }
}

Recipes make_recipes() {
  Recipes recipes(max_modulus + 1);
  for (std::int64_t c = 1; c <= max_modulus; ++c) {
    if (c <= max_tabulated_modulus) {
      recipes[c].size = static_cast<std::int32_t>(tabulated_cover(c).size());
    } else {
      recipes[c] = best_wichmann(c);
    }
  }
  for (std::int32_t q = 2; q * q + q + 1 <= max_modulus; ++q) {
    Recipe& recipe = recipes[q * q + q + 1];
    if (q + 1 < recipe.size && is_prime_power(q)) recipe = {Recipe::Kind::singer, q + 1, q, 0};
  }
  improve_by_products(recipes);
  return recipes;
}

const Recipe& recipe_of(std::int64_t c) {
  if (c < 1 || c > max_modulus) {
    throw InputError(fmt::format("{} chunks; from 1 to {} are supported", c, max_modulus));
  }
  static const Recipes recipes = make_recipes();
  return recipes[c];
}

// { a + c1 * b } covers Z_(c1 * c2): whatever a difference a - a' carries past c1, a difference
// b - b' makes good, as they give every residue mod c2. The factors need not be coprime.
std::vector<std::int32_t> product(const DifferenceCover& first, const DifferenceCover& second) {
  std::vector<std::int32_t> residues;
  for (const std::int32_t b : second.residues) {
    for (const std::int32_t a : first.residues) {
      residues.push_back(a + static_cast<std::int32_t>(first.modulus) * b);
    }
  }
  return residues;
}

std::vector<std::int32_t> make_residues(std::int64_t c) {
  const Recipe& recipe = recipe_of(c);
  switch (recipe.kind) {
    case Recipe::Kind::singer:
      return singer_difference_set(recipe.first);
    case Recipe::Kind::wichmann:
      return wichmann_ruler(recipe.first, recipe.second);
    case Recipe::Kind::product:
      return product(difference_cover(recipe.first), difference_cover(recipe.second));
    case Recipe::Kind::table:
      break;
  }
  const auto row = tabulated_cover(c);
  return {row.begin(), row.end()};
}

}  // namespace

DifferenceCover difference_cover(std::int64_t c) { return {c, make_residues(c)}; }

std::int64_t difference_cover_size(std::int64_t c) { return recipe_of(c).size; }

bool is_difference_cover(std::int64_t c, std::span<const std::int32_t> residues) {
  if (c < 1 || residues.empty() || residues.front() != 0 || residues.back() >= c) return false;
  for (std::size_t i = 1; i < residues.size(); ++i) {
    if (residues[i] <= residues[i - 1]) return false;
  }
  std::vector<bool> covered(c, false);
  covered[0] = true;
  for (std::size_t i = 0; i < residues.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const std::int64_t d = residues[i] - residues[j];
      covered[d] = covered[c - d] = true;
    }
  }
  return std::find(covered.begin(), covered.end(), false) == covered.end();
}

}  // namespace stream_cqsa
