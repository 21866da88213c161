# sage_jax_package_dir(<package> <variable>): the folder of an importable Python package. It is
# located, not imported, so that a package whose own dependencies are absent (jaxlib in a build
# environment) works.
function(sage_jax_package_dir package variable)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "from importlib.util import find_spec
print(list(find_spec('${package}').submodule_search_locations)[0])"
    OUTPUT_VARIABLE dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed AND NOT ARGV2 STREQUAL "OPTIONAL")
    message(FATAL_ERROR "${Python_EXECUTABLE} has no package `${package}`, which building sage_jax "
                        "needs: run `${Python_EXECUTABLE} -m pip install ${package}`.")
  endif()
  set(${variable} "${dir}" PARENT_SCOPE)
endfunction()
