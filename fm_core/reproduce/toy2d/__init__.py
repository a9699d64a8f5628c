"""The 2-D experiments: the checkerboard, a small network, scores and figures."""
