"""The speed of the sampling engine; each module measures one case."""
