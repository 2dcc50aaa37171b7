// MPI for the time of a test program. Included by its main file, behind Boost.Test.
#pragma once

#include <boost/test/unit_test.hpp>
#include <optional>

#include "mpi/communicator.hpp"
#include "mpi/environment.hpp"

namespace stream_cqsa::testing {

/// To be made a BOOST_TEST_GLOBAL_FIXTURE.
struct MpiWorld {
  MpiWorld()
      : environment(boost::unit_test::framework::master_test_suite().argc,
                    boost::unit_test::framework::master_test_suite().argv) {
    communicator.emplace();
  }
  ~MpiWorld() { communicator.reset(); }
  MpiEnvironment environment;
  static inline std::optional<Communicator> communicator;
};

/// All ranks of the test.
inline Communicator& world() { return *MpiWorld::communicator; }

}  // namespace stream_cqsa::testing
