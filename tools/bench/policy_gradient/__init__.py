"""The bias and the variance of every policy-gradient estimator, against the true gradient."""
