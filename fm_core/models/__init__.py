"""Networks: every one maps (t [N], x [N, ...], label [N] or None) to a tensor shaped like x."""
