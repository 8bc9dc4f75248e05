"""The top-k step in C++ for CPUs."""
