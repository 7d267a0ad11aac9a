"""Reports: plots and an HTML page of what a run measured, made from the files of the run alone."""
