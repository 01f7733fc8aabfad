"""Accuracy against cost: where curves, levels and rows are, and bad input."""

import numpy as np
import pytest
from matplotlib import image

from tda.report import cost
from tda.report.cost import Curve

BLUE, RED = (0, 114, 178), (213, 94, 0)


def curve(iterations, seconds, mean):
  mean = np.asarray(mean, float)
  return Curve(iterations, seconds, mean, mean - 0.01, mean + 0.01)


CURVES = {
  "cg": curve([1, 10, 100], [0.1, 1, 10], [0.2, 0.5, 0.8]),
  "ekfac": curve([0], [1.0], [0.5]),
}


def where(path, colour, start, stop):
  """Rows and columns of a colour between two parts of the width."""
  pixels = np.round(image.imread(path)[..., :3] * 255)
  rows, columns = np.nonzero(np.abs(pixels - colour).max(-1) <= 8)
  parts = columns / pixels.shape[1]
  kept = (parts > start) & (parts < stop)
  return rows[kept], parts[kept]


def test_iterations_make_a_curve_and_none_a_level_and_a_point(tmp_path):
  path = tmp_path / "cost.png"
  cost.figure(path, CURVES)
  rows, columns = where(path, BLUE, 0, 0.45)
  first, last = (
    rows[columns == end].mean() for end in (columns.min(), columns.max())
  )
  level, across = where(path, RED, 0, 0.45)
  assert np.ptp(level) <= 4 and np.ptp(across) > 0.9 * np.ptp(columns)
  # From 0.2 up to 0.8 (and rows count down), with the level midway.
  middle = (first + last) / 2
  assert last < first and abs(level.mean() - middle) < 0.03 * (first - last)
  # The names on the right begin beyond: here is the marker alone.
  point, place = where(path, RED, 0.5, 0.78)
  assert abs(point.mean() - level.mean()) < 2 and np.ptp(place) < 0.02
  # It hides the curve's second point, of the same accuracy and seconds.
  rows, columns = where(path, BLUE, 0.5, 0.78)
  assert np.abs(columns - place.mean()).min() > 0.003


def test_a_row_for_each_method_and_count():
  both = {"pearson": CURVES, "spearman": CURVES}
  table = cost.text(both, shown=(10,)).splitlines()
  assert table[0].split() == [
    "method", "iterations", "seconds", "pearson", "spearman",
  ]  # fmt: skip
  assert [row.split()[:3] for row in table[2:4]] == [
    ["CG", "10", "1.00"],
    ["CG", "100", "10.00"],  # the last is always shown
  ]
  assert table[4].split()[:2] == ["EK-FAC", "1.00"]
  assert table[3].count("0.800 [ 0.790,  0.810]") == 2
  assert len(cost.text(both).splitlines()) == 2 + 4


@pytest.mark.parametrize(
  ("curves", "message"),
  [
    ({}, "no method"),
    ({"cg": curve([1, 2], [1.0], [0.1, 0.2])}, r"'cg' must all be \[K\]"),
    ({"cg": curve([0, 0], [1.0, 2.0], [0.1, 0.2])}, "2 points and no iter"),
    ({"cg": curve([1], [0.0], [0.1])}, "seconds of 'cg'"),
  ],
)
def test_bad_curves_are_named(tmp_path, curves, message):
  with pytest.raises(ValueError, match=message):
    cost.figure(tmp_path / "cost.png", curves)
