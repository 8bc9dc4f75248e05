"""Reading and writing SAEs in the formats of saetrain, SAELens and sparsify."""
