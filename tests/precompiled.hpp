// What most tests include, compiled once: see src/precompiled.hpp. Not <boost/test/unit_test.hpp>,
// whose content depends on a test's BOOST_TEST_MODULE, but what that is made of.
#pragma once

#include <boost/test/framework.hpp>
#include <boost/test/test_tools.hpp>
#include <boost/test/tree/auto_registration.hpp>
#include <boost/test/tree/global_fixture.hpp>
#include <boost/test/tree/test_case_template.hpp>
#include <fstream>
#include <random>
#include <sstream>

#include "../src/precompiled.hpp"

// For every test to read that header again: it makes a main file of what defines BOOST_TEST_MODULE.
#undef BOOST_TEST_CONFIG_HPP_071894GER
