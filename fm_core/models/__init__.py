"""Networks: each maps (t [N], x [N, ...], label int64 [N] or None) to a tensor shaped like x.

A network of a flow map takes a fourth argument, the second time s [N].
"""
