"""Architectures that only the tests have, each in one file, as a user would write them."""
