"""Feature extractors, Fréchet distance, bits/dim over a data set."""
