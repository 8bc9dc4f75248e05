"""The training steps of other tools, each imported in an environment of its own."""
