// Busy times of stages that run inside one another.
#define BOOST_TEST_MODULE app_telemetry
#include "stream_cqsa/telemetry.hpp"

#include <boost/test/unit_test.hpp>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

using namespace stream_cqsa;

namespace {

void spin() {
  const double end = now_seconds() + 0.005;
  while (now_seconds() < end) {
  }
}

StageTotals of(const Telemetry& telemetry, Stage stage) {
  return telemetry.totals()[static_cast<std::size_t>(stage)];
}

}  // namespace

BOOST_AUTO_TEST_CASE(time_inside_another_stage_counts_once) {
  Telemetry telemetry;
  const double begin = now_seconds();
  {
    const StageTimer read(telemetry, Stage::read, 7, -1);
    {
      const StageTimer checksum(telemetry, Stage::checksum, 5, -1);
      const StageTimer sync(telemetry, Stage::sync, 0, -1);
      spin();
    }
    const StageTimer again(telemetry, Stage::checksum, 5, -1);
    spin();
  }
  const double elapsed = now_seconds() - begin;
  double busy = 0;
  for (const Stage stage : {Stage::read, Stage::checksum, Stage::sync}) {
    BOOST_TEST(of(telemetry, stage).busy_seconds >= 0);
    busy += of(telemetry, stage).busy_seconds;
  }
  BOOST_TEST(of(telemetry, Stage::sync).busy_seconds >= 0.005);
  BOOST_TEST(of(telemetry, Stage::checksum).busy_seconds >= 0.005);
  BOOST_TEST(busy <= elapsed * (1 + 1e-9));
  BOOST_TEST(of(telemetry, Stage::read).bytes == 7);
  BOOST_TEST(of(telemetry, Stage::checksum).bytes == 10);
  BOOST_TEST(of(telemetry, Stage::checksum).operations == 2);
}

BOOST_AUTO_TEST_CASE(timers_of_other_threads_are_not_inside) {
  Telemetry telemetry;
  {
    const StageTimer read(telemetry, Stage::read, 0, -1);
    std::thread([&] {
      const StageTimer merge(telemetry, Stage::merge, 0, -1);
      spin();
    }).join();
  }
  BOOST_TEST(of(telemetry, Stage::merge).busy_seconds >= 0.005);
  BOOST_TEST(of(telemetry, Stage::read).busy_seconds >= 0.005);
}

BOOST_AUTO_TEST_CASE(a_trace_shows_intervals_whole) {
  std::ostringstream text;
  {
    Telemetry telemetry(&text);
    const StageTimer read(telemetry, Stage::read, 0, 3);
    const StageTimer checksum(telemetry, Stage::checksum, 0, -1);
    spin();
  }
  const auto events = nlohmann::json::parse(text.str());
  BOOST_REQUIRE(events.size() == 2);
  BOOST_TEST(events[0]["name"] == "checksum");
  BOOST_TEST(events[1]["name"] == "read");
  BOOST_TEST(events[1]["args"]["subproblem"] == 3);
  BOOST_TEST(events[1]["dur"].get<double>() >= events[0]["dur"].get<double>());
}

BOOST_AUTO_TEST_CASE(every_stage_has_a_name_of_its_own) {
  std::set<std::string_view> names;
  for (int i = 0; i < stage_count; ++i) names.insert(name_of(static_cast<Stage>(i)));
  BOOST_TEST(names.size() == stage_count);
  BOOST_TEST(!names.contains(""));
}
