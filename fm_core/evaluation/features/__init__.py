"""Feature extractors: InceptionV3, a classifier trained on the data set, and custom modules."""
