# OpenBLAS as the target stream_cqsa::openblas. Any BLAS would not do: its cblas.h and
# openblas_set_num_threads are used. Also part of the installed package.
find_package(OpenBLAS CONFIG QUIET)
if(OpenBLAS_FOUND AND NOT TARGET stream_cqsa::openblas)
  add_library(stream_cqsa::openblas INTERFACE IMPORTED)
  target_include_directories(stream_cqsa::openblas SYSTEM INTERFACE ${OpenBLAS_INCLUDE_DIRS})
  target_link_libraries(stream_cqsa::openblas INTERFACE ${OpenBLAS_LIBRARIES})
endif()
