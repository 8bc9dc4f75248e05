"""The recipe against other tools' recipes: the same activations, FVU and dead latents of each."""
