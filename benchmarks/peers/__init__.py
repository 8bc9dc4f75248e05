"""Other trainers' own steps, each imported in an environment of its own."""
