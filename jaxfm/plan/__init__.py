"""Plans: what a resolved config will need, before anything is allocated."""
