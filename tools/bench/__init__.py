"""Benchmarks; each writes its results as JSON, with the machine, the versions and the date."""
