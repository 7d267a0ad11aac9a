"""Building a run from a resolved config and a work directory: model, data, phases, weights."""
