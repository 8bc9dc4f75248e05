"""Share a run: model cards of its SAEs, and the upload to the Hugging Face hub."""
