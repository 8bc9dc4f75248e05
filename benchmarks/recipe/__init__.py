"""saetrain's recipe compared with those of other tools: FVU and dead latents on the same activations."""
