# Decides whether the CUDA kernels are built, with which nvcc and for which architectures.
#
# nvcc comes from CUDACXX, the PATH, /usr/local/cuda or the PyPI toolkit (package nvidia-cuda-nvcc,
# which unpacks to nvidia/cu13), in this order. AUTO also wants a driver: without one the kernels
# could not run here, and compiling them takes minutes.
set(SAGE_JAX_BUILD_CUDA OFF)
if(NOT SAGE_JAX_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SAGE_JAX_CUDA is `${SAGE_JAX_CUDA}`: choose AUTO, ON or OFF.")
endif()
if(SAGE_JAX_CUDA STREQUAL "OFF")
  message(STATUS "CUDA kernels: not built (SAGE_JAX_CUDA=OFF)")
  return()
endif()

sage_jax_package_dir(nvidia.cu13 PYPI_CUDA_DIR OPTIONAL)
find_program(SAGE_JAX_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin ${PYPI_CUDA_DIR}/bin)
if(DEFINED ENV{CUDACXX})
  set(SAGE_JAX_NVCC $ENV{CUDACXX})
endif()
find_program(SAGE_JAX_NVIDIA_SMI nvidia-smi)
find_library(SAGE_JAX_LIBCUDA NAMES libcuda.so.1 cuda)

if(NOT SAGE_JAX_NVCC)
  string(CONCAT reason "no nvcc found: set CUDACXX, or "
         "`pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-runtime`")
elseif(SAGE_JAX_CUDA STREQUAL "AUTO" AND NOT SAGE_JAX_NVIDIA_SMI AND NOT SAGE_JAX_LIBCUDA)
  set(reason "no GPU driver found: set SAGE_JAX_CUDA=ON to compile them all the same")
endif()
if(reason)
  if(SAGE_JAX_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SAGE_JAX_CUDA=ON, but ${reason}.")
  endif()
  message(STATUS "CUDA kernels: not built (${reason})")
  return()
endif()

set(archs ${SAGE_JAX_CUDA_ARCHS})
if(NOT archs AND SAGE_JAX_NVIDIA_SMI)
  execute_process(COMMAND ${SAGE_JAX_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE caps ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" archs "${caps}")
    list(TRANSFORM archs REPLACE "\\." "")
  endif()
endif()
# The matrix instructions of these need the suffix.
list(TRANSFORM archs REPLACE "^(90|12[0-9])$" "\\1a")
list(REMOVE_DUPLICATES archs)
if(NOT archs)
  set(archs 80 89 90a 120a)
endif()
set(SAGE_JAX_CUDA_ARCHS "${archs}")  # for cuda/CMakeLists.txt, which picks each kernel's targets
list(TRANSFORM archs APPEND "-real")
set(CMAKE_CUDA_ARCHITECTURES ${archs})
set(CMAKE_CUDA_COMPILER ${SAGE_JAX_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(SAGE_JAX_BUILD_CUDA ON)
message(STATUS "CUDA kernels: ${SAGE_JAX_NVCC} for ${SAGE_JAX_CUDA_ARCHS}")
