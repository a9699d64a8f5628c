"""Networks: each maps (t [N], x [N, ...], label int64 [N] or None) to a tensor shaped like x."""
