#define BOOST_TEST_MODULE engine_journal
#include "engine/journal.hpp"

#include <boost/test/unit_test.hpp>
#include <random>
#include <set>

#include "engine/checksum.hpp"
#include "stream_cqsa/error.hpp"
#include "support/durable_run.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

constexpr std::uint64_t identity = 42;

std::vector<std::byte> random_bytes(std::size_t count, std::mt19937_64& random) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

JournalRecord random_record(std::mt19937_64& random) {
  const auto number = [&] { return static_cast<std::int64_t>(random() >> 1); };
  JournalRecord record;
  record.kind = random() % 2 ? JournalRecord::Kind::state : JournalRecord::Kind::finished;
  record.key = {number(), number(), number(), number()};
  record.merged = number();
  record.scores = number();
  record.slot = record.kind == JournalRecord::Kind::state ? number() : -1;
  record.data = random();
  record.lse = random();
  record.non_finite = {number(), number()};
  return record;
}

Problem small_problem() {
  Problem problem;
  problem.query_heads = problem.kv_heads = 1;
  problem.query_length = problem.key_length = 28;
  problem.head_dim = 8;
  problem.dtype = DType::f16;
  problem.output_dtype = DType::f16;
  problem.mask = Mask::causal;
  problem.scale = default_scale(8);
  return problem;
}

TestInput small_input() {
  std::mt19937_64 random(3);
  return random_input(small_problem(), Layout::bshd, 1, random);
}

Plan seven_chunks() {
  PlanRequest request = roomy_request(small_problem(), Layout::bshd, *make_test_backend(1));
  request.device.tile = 1;
  request.chunks = 7;
  request.host_accumulators = true;
  return make_plan(request);
}

// A run that is stopped in the middle: what it leaves, and the bytes that it would have come to.
struct StoppedRun {
  const TestInput input = small_input();
  const Plan plan = seven_chunks();
  TestDirectory directory;
  std::vector<std::byte> expected_output, expected_lse;  // of an undisturbed run
  std::vector<std::byte> output, lse;                    // as the stopped run left them
  std::vector<char> journal, states;

  StoppedRun() {
    DurableRuns undisturbed(plan, input);
    undisturbed.run(*make_test_backend(1), options(directory.path() / "nowhere", false));
    expected_output = undisturbed.output;
    expected_lse = undisturbed.lse;

    DurableRuns runs(plan, input);
    StopRequest stop;
    RunOptions stopping = options(directory.path(), true);
    stopping.checkpoint.stop = &stop;
    HoldingBackend backend(make_test_backend(1), stop, 5);
    BOOST_REQUIRE_THROW(runs.run(backend, stopping), Stopped);
    output = runs.output;
    lse = runs.lse;
    journal = read_file(directory.path() / "journal");
    states = read_file(directory.path() / "states");
  }

  static RunOptions options(const std::filesystem::path& path, bool checkpoint) {
    RunOptions options;
    options.scratch = std::filesystem::temp_directory_path();
    if (!checkpoint) return options;
    options.checkpoint.directory = path;
    options.checkpoint.identity = identity;
    return options;
  }

  // Continues with these files; the bytes must be those of the undisturbed run.
  Resumed resume(const std::vector<char>& with_journal, const std::vector<char>& with_states,
                 const std::vector<std::byte>& with_output) {
    write_file(directory.path() / "journal", with_journal);
    write_file(directory.path() / "states", with_states);
    DurableRuns runs(plan, input);
    runs.output = with_output;
    runs.lse = lse;
    const RunResult result = runs.run(*make_test_backend(1), options(directory.path(), true));
    BOOST_TEST((runs.output == expected_output && runs.lse == expected_lse));
    return result.checkpoint.resumed;
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(every_flipped_bit_changes_the_checksum) {
  std::mt19937_64 random(1);
  for (const std::size_t bytes : {1, 7, 8, 9, 31, 32, 33, 64, 100, 257}) {
    std::vector<std::byte> data = random_bytes(bytes, random);
    std::set<std::uint64_t> sums = {checksum(data, 5)};
    for (std::size_t bit = 0; bit < 8 * bytes; ++bit) {
      data[bit / 8] ^= std::byte{1} << (bit % 8);
      BOOST_TEST(sums.insert(checksum(data, 5)).second);
      data[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    BOOST_TEST(!sums.insert(checksum(data, 5)).second);
    BOOST_TEST(sums.insert(checksum(data, 6)).second);
    data.push_back(std::byte{0});
    BOOST_TEST(sums.insert(checksum(data, 5)).second);
  }
  BOOST_TEST(data_seed({0, 1, 2, 3}, 4) != data_seed({0, 1, 2, 3}, 5));
  BOOST_TEST(data_seed({0, 1, 2, 3}, 4) != data_seed({0, 1, 3, 2}, 4));
}

BOOST_AUTO_TEST_CASE(a_journal_reads_back_and_is_cut_at_the_first_bad_record) {
  const TestDirectory directory;
  const auto path = directory.path() / "journal";
  std::mt19937_64 random(2);
  std::vector<JournalRecord> records;
  {
    Journal journal(path, identity);
    BOOST_TEST(journal.records().empty());
    for (int i = 0; i < 5; ++i) records.push_back(random_record(random));
    journal.append(std::span(records).first(2));
    journal.append(std::span(records).subspan(2));
  }
  const std::vector<char> whole = read_file(path);
  BOOST_TEST(whole.size() == 32 + 5 * 104);
  BOOST_TEST((Journal(path, identity).records() == records));
  BOOST_CHECK_THROW(Journal(path, identity + 1), InputError);
  for (std::size_t size = 0; size <= whole.size(); ++size) {
    write_file(path, {whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
    const Journal journal(path, identity);
    const std::size_t sound = size < 32 ? 0 : (size - 32) / 104;
    BOOST_TEST(journal.records().size() == sound);
    BOOST_TEST(journal.dropped_records() == (size > 32 + sound * 104 ? 1 : 0));
    BOOST_TEST(journal.damaged_header() == (size < 32));
    BOOST_TEST(std::filesystem::file_size(path) == 32 + sound * 104);
  }
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::vector<char> flipped = whole;
    flipped[at] ^= static_cast<char>(1 << (at % 8));
    write_file(path, flipped);
    const Journal journal(path, identity);
    // A flipped header loses nothing: every record bears the identity.
    const std::size_t sound = at < 32 ? 5 : (at - 32) / 104;
    BOOST_TEST(
        (journal.records() ==
         std::vector(records.begin(), records.begin() + static_cast<std::ptrdiff_t>(sound))));
    BOOST_TEST(journal.damaged_header() == (at < 32));
  }
}

BOOST_AUTO_TEST_CASE(a_journal_is_replaced_and_appended_to) {
  const TestDirectory directory;
  const auto path = directory.path() / "journal";
  std::mt19937_64 random(4);
  const std::vector<JournalRecord> records = {random_record(random), random_record(random)};
  Journal journal(path, identity);
  for (int i = 0; i < 9; ++i) journal.append(records);
  journal.replace(std::span(records).first(1));
  BOOST_TEST(journal.count() == 1);
  journal.append(std::span(records).last(1));
  BOOST_TEST((Journal(path, identity).records() == records));
  BOOST_TEST(!std::filesystem::exists(path.string() + ".partial"));
}

BOOST_AUTO_TEST_CASE(a_journal_cut_anywhere_gives_the_same_bytes) {
  StoppedRun run;
  BOOST_TEST_REQUIRE(run.journal.size() > 32 + 5 * 104);
  BOOST_TEST(run.resume(run.journal, run.states, run.output).recomputed == 0);
  for (std::size_t size = 0; size < run.journal.size(); ++size) {
    const std::vector<char> cut(run.journal.begin(),
                                run.journal.begin() + static_cast<std::ptrdiff_t>(size));
    const Resumed resumed = run.resume(cut, run.states, run.output);
    BOOST_TEST(resumed.recomputed == 0);
    const bool torn = size > 32 && (size - 32) % 104 != 0;
    BOOST_TEST(resumed.dropped_records == (torn ? 1 : 0));
  }
}

BOOST_AUTO_TEST_CASE(flipped_bytes_are_found_and_give_the_same_bytes) {
  StoppedRun run;
  const auto flip = [](auto bytes, std::size_t at) {
    bytes[at] = static_cast<typename decltype(bytes)::value_type>(
        static_cast<unsigned char>(bytes[at]) ^ (1u << (at % 8)));
    return bytes;
  };
  constexpr std::size_t step = 7;
  for (std::size_t at = 0; at < run.journal.size(); at += step) {
    BOOST_TEST(run.resume(flip(run.journal, at), run.states, run.output).is_damaged());
  }
  std::int64_t found = 0;
  for (std::size_t at = 0; at < run.states.size(); at += step) {
    found += run.resume(run.journal, flip(run.states, at), run.output).recomputed;
  }
  BOOST_TEST(found > 0);
  found = 0;
  for (std::size_t at = 0; at < run.output.size(); ++at) {
    found += run.resume(run.journal, run.states, flip(run.output, at)).recomputed;
  }
  BOOST_TEST(found > 0);
}

BOOST_AUTO_TEST_CASE(missing_files_give_the_same_bytes) {
  StoppedRun run;
  BOOST_TEST(run.resume(run.journal, {}, run.output).recomputed > 0);
  BOOST_TEST(run.resume({}, run.states, run.output).pieces == 0);
  const std::vector<std::byte> nothing(run.output.size());
  BOOST_TEST(run.resume(run.journal, run.states, nothing).recomputed > 0);
  std::filesystem::remove(run.directory.path() / "states");
  std::filesystem::remove(run.directory.path() / "journal");
  DurableRuns runs(run.plan, run.input);
  runs.run(*make_test_backend(1), StoppedRun::options(run.directory.path(), true));
  BOOST_TEST((runs.output == run.expected_output));
}
