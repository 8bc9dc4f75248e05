"""Features: what each latent of an SAE fires on, what it writes, and how it relates to the other latents."""
