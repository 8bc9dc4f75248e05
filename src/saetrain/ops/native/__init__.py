"""The TopK step in C++ for CPUs."""
