// What most of the program's sources include, compiled once: see src/precompiled.hpp.
#pragma once

#include <boost/program_options.hpp>
#include <nlohmann/json.hpp>

#include "precompiled.hpp"
