"""The commands: each runs the stages in the order in which data flows."""
