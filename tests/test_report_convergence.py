"""Small multiples on logarithmic axes: what is drawn, and what is refused."""

import numpy as np
import pytest
from matplotlib import image

from tda.report import convergence

BLUE, RED = (0, 114, 178), (213, 94, 0)
X = np.arange(5)
CASES = {
  "one": {"fast": (X, 10.0 ** (-3 * X)), "slow": (X, 10.0**-X)},
  "two": {"fast": (X, 10.0 ** (-2 * X))},
}
AXES = {"xlabel": "iteration", "ylabel": "error"}


def pixels(path):
  """uint8 [H, W, 3]."""
  return np.round(image.imread(path)[..., :3] * 255).astype(int)


def where(path, colour):
  """Rows and columns of the pixels of a colour below the legend."""
  found = np.abs(pixels(path) - colour).max(-1) <= 40
  found[: len(found) // 6] = False
  return np.nonzero(found)


def test_a_panel_for_each_case_on_shared_logarithmic_axes(tmp_path):
  path = tmp_path / "lines.png"
  convergence.lines(path, CASES, **AXES)
  rows, columns = where(path, BLUE)
  between = np.unique(columns)
  gap = between[np.diff(between).argmax()]
  fast, other = (np.ptp(rows[side]) for side in (columns <= gap, columns > gap))
  slow, place = where(path, RED)
  # Twelve, eight and four powers of ten on one scale; a line is some pixels.
  found = [other / fast, np.ptp(slow) / fast]
  np.testing.assert_allclose(found, [2 / 3, 1 / 3], 0.04)
  assert place.max() <= gap + 4


def test_time_is_a_line_where_it_is_a_power(tmp_path):
  dims = np.array([64, 256, 1024, 4096])
  path = tmp_path / "time.png"
  convergence.lines(
    path, {"": {"inverse": (dims, dims**3.0)}}, log_x=True, **AXES
  )
  rows, columns = where(path, BLUE)
  slope, at = np.polyfit(columns, rows, 1)
  assert np.abs(rows - slope * columns - at).max() < 6  # its width


def test_a_level_is_drawn_in_each_panel(tmp_path):
  for name, level in (("without", None), ("with", {"one": 1e-6, "two": 1e-6})):
    convergence.lines(tmp_path / name, CASES, level=level, **AXES)
  difference = pixels(tmp_path / "with") != pixels(tmp_path / "without")
  rows, columns = np.nonzero(difference.any(-1))
  assert np.ptp(rows) < 6
  assert np.ptp(columns) > 0.8 * difference.shape[1]


@pytest.mark.parametrize(
  ("cases", "message"),
  [
    ({}, "one panel or more"),
    ({"one": {}}, "a line in each"),
    ({"one": {"fast": (X, X[1:] + 1.0)}}, "'fast'.*same length"),
    ({"one": {"fast": (X, X.astype(float))}}, "y > 0, got 0.0"),
  ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, cases, message):
  with pytest.raises(ValueError, match=message):
    convergence.lines(tmp_path / "none.png", cases, **AXES)
  assert not (tmp_path / "none.png").exists()
