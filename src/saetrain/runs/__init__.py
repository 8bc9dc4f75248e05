"""The commands: the stages joined, in the order in which data flow."""
