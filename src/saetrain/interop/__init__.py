"""Reading and writing SAEs in the formats of saetrain and of other libraries."""
