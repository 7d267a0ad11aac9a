"""Plans: the FLOPs and memory that a resolved config needs, before anything is allocated."""
