# Writes version.hpp with the commit of the sources; untouched while nothing has changed.
find_program(git git)
set(COMMIT unknown)
if(git)
  execute_process(COMMAND ${git} describe --always --dirty --abbrev=12 --exclude=*
                  WORKING_DIRECTORY ${SOURCE} OUTPUT_VARIABLE described ERROR_QUIET
                  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(NOT failed)
    set(COMMIT ${described})
  endif()
endif()
configure_file(${TEMPLATE} ${HEADER} @ONLY)
