// Two runs on one name, where the file system says that it is NFS.
#define BOOST_TEST_MODULE io_network_lock
#include <linux/magic.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <optional>
#include <string>

#include "io/partial_file.hpp"
#include "stream_cqsa/error.hpp"
#include "support/durable_run.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;
namespace fs = std::filesystem;

// In place of the C library's.
extern "C" int statfs(const char* path, struct statfs* into) noexcept {
  const auto status = static_cast<int>(syscall(SYS_statfs, path, into));
  into->f_type = NFS_SUPER_MAGIC;
  return status;
}

namespace {

bool is_told_of_another_run(const Error& error) {
  return std::string(error.what()).find("is being written by another run") != std::string::npos;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_locked_name_is_refused) {
  const TestDirectory directory;
  const fs::path path = directory.path() / "lock";
  {
    const Descriptor first = open_locked(path);
    BOOST_CHECK_EXCEPTION(open_locked(path), InputError, is_told_of_another_run);
  }
  BOOST_CHECK_NO_THROW(open_locked(path));
}

BOOST_AUTO_TEST_CASE(a_partial_file_is_one_runs_though_its_own_lock_is_left_to_mpi) {
  for (const bool keep : {false, true}) {
    const TestDirectory directory;
    const fs::path path = directory.path() / "o.npy";
    const fs::path partial = directory.path() / "o.npy.partial";
    std::optional<PartialFile> first(std::in_place, path, open_posix_file, keep);
    BOOST_CHECK_EXCEPTION(PartialFile(path, open_posix_file, keep), InputError,
                          is_told_of_another_run);
    BOOST_CHECK_NO_THROW(open_locked(partial));
    first.reset();
    BOOST_TEST(fs::exists(partial) == keep);
    PartialFile second(path, open_posix_file, keep);
    second.commit();
    BOOST_TEST(fs::exists(path));
    BOOST_TEST(!fs::exists(partial));
    BOOST_TEST(!fs::exists(directory.path() / "o.npy.partial.lock"));
  }
}
