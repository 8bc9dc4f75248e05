"""What is timed, how, and against what: ``python -m benchmarks`` (docs/performance.md explains it)."""
