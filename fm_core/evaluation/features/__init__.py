"""Feature extractors: Inception, a classifier of the data set, and modules from outside."""
