"""The plot of a sweep: a line per setting, and the best point on fresh samples where there is one."""

import pytest

from fm_core.report.plots import sweep_lines

LINES = {"euler": [(0.0, 3.0, 0.1), (1.0, 2.0, 0.2)], "heun": [(1.0, 1.5, 0.1), (0.0, 2.5, 0.1)]}
TICKS = {0.0: "4", 1.0: "8"}


def drawn(**options) -> list[list[tuple[float, float]]]:
    """Points of each series of error bars, in order."""
    (axes,) = sweep_lines(LINES, "steps", "distance", TICKS, **options).figure.axes
    return [[*map(tuple, series.lines[0].get_xydata().tolist())] for series in axes.containers]


def test_each_line_has_its_points_in_order_beside_those_of_the_others():
    euler, heun = drawn()
    assert [y for _, y in euler] == [3.0, 2.0]
    assert [y for _, y in heun] == [2.5, 1.5]
    assert [x for x, _ in euler] == pytest.approx([-0.04, 0.96])
    assert [x for x, _ in heun] == pytest.approx([0.04, 1.04])


def test_the_best_point_on_fresh_samples_is_drawn_where_it_is_known():
    *lines, fresh = drawn(fresh=(1.0, 1.8, 0.1))
    assert len(lines) == 2
    assert fresh == [(1.0, 1.8)]
