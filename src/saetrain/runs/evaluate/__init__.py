"""The evaluate command: score saved SAEs on held-out text."""
