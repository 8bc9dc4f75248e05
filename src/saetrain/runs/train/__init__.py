"""The training command: resolve the settings, build the trainer, run the loop, save and evaluate the SAEs."""
