// A few elements of SVG, written as they come.
#pragma once

#include <ostream>
#include <string>
#include <string_view>

namespace stream_cqsa {

/// "#rrggbb" of a hue in degrees, a saturation and a lightness in 0..1.
std::string rgb(double hue, double saturation, double lightness);

enum class Anchor { start, middle, end };

struct TextStyle {
  double size = 13;  ///< pixels
  std::string_view colour = "black";
  Anchor anchor = Anchor::start;
  bool bold = false;
  bool upwards = false;  ///< read from below to above
};

/// A drawing of a fixed size on white. end() closes it.
class Svg {
 public:
  Svg(std::ostream& out, double width, double height);

  void text(double x, double y, const TextStyle& style, std::string_view text);
  void rect(double x, double y, double width, double height, std::string_view fill,
            std::string_view stroke = "none");
  /// `attributes` are written into the element as they are.
  void path(std::string_view attributes, std::string_view data);
  void end() { out_ << "</svg>\n"; }

  /// A fill of white diagonal stripes that let what lies below show through.
  static constexpr std::string_view hatch = "url(#hatch)";

 private:
  std::ostream& out_;
};

}  // namespace stream_cqsa
