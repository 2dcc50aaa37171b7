#include "core/svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace stream_cqsa {
namespace {

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      default:
        result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return result;
}

}  // namespace

std::string rgb(double hue, double saturation, double lightness) {
  const auto channel = [&](double n) {
    const double k = std::fmod(n + hue / 30.0, 12.0);
    const double a = saturation * std::min(lightness, 1.0 - lightness);
    const double value = lightness - a * std::max(-1.0, std::min({k - 3.0, 9.0 - k, 1.0}));
    return static_cast<int>(std::lround(255.0 * value));
  };
  return fmt::format("#{:02x}{:02x}{:02x}", channel(0), channel(8), channel(4));
}

Svg::Svg(std::ostream& out, double width, double height) : out_(out) {
  out_ << fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
      "<defs><pattern id=\"hatch\" width=\"5\" height=\"5\" patternUnits=\"userSpaceOnUse\" "
      "patternTransform=\"rotate(45)\"><rect width=\"2\" height=\"5\" fill=\"white\" "
      "fill-opacity=\"0.4\"/></pattern></defs>\n",
      width, height);
  rect(0, 0, width, height, "white");
}

void Svg::text(double x, double y, const TextStyle& style, std::string_view text) {
  constexpr std::array<std::string_view, 3> anchors = {"start", "middle", "end"};
  out_ << fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" "
      "text-anchor=\"{}\"{}{}>{}</text>\n",
      x, y, style.size, style.colour, anchors[static_cast<std::size_t>(style.anchor)],
      style.bold ? " font-weight=\"bold\"" : "",
      style.upwards ? fmt::format(" transform=\"rotate(-90 {:.1f} {:.1f})\"", x, y) : "",
      escaped(text));
}

void Svg::rect(double x, double y, double width, double height, std::string_view fill,
               std::string_view stroke) {
  out_ << fmt::format(
      "<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" fill=\"{}\" "
      "stroke=\"{}\"/>\n",
      x, y, width, height, fill, stroke);
}

void Svg::path(std::string_view attributes, std::string_view data) {
  if (data.empty()) return;
  out_ << "<path " << attributes << " d=\"" << data << "\"/>\n";
}

}  // namespace stream_cqsa
