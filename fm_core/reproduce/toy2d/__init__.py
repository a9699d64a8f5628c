"""The comparison on two-dimensional data: the checkerboard, a small network, scores, figures."""
