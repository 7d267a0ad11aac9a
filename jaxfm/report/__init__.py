"""Reports: plots and an HTML page of what a run measured, made only from its files."""
