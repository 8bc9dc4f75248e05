"""Training of coders: the optimizer step, dead latents, loss spikes, placement on ranks, and checkpoints."""
