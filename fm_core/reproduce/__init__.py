"""The paper's comparisons: experiments, aggregation, claims, pages."""
