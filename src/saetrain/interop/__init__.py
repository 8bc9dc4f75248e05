"""Our files <-> theirs: one file per format."""
