"""One JAX codebase for the whole life of a foundation model."""
