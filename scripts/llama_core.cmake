# Read by CMake right after llama.cpp's own project() call.
# llama-cpp-python switches llama.cpp's "common" library on; its Python package never loads it.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "only what the Python package loads" FORCE)
