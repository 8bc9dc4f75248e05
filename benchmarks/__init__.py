"""Benchmarks of training speed, memory and quality; benchmarks/performance.md explains the method."""
