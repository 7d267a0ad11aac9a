"""Reports: what a run measured, as pictures and a page, made of its files alone."""
