# Installs the library and its CMake package.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/stream_cqsa)

install(TARGETS stream_cqsa EXPORT stream_cqsaTargets)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT stream_cqsaTargets NAMESPACE stream_cqsa:: DESTINATION ${package_dir})

get_target_property(library_type stream_cqsa TYPE)
configure_package_config_file(stream_cqsaConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/stream_cqsaConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(
  ${CMAKE_CURRENT_BINARY_DIR}/stream_cqsaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/stream_cqsaConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/stream_cqsaConfigVersion.cmake
              openblas.cmake
        DESTINATION ${package_dir})
