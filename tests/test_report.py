"""Figures are files of pixels that show the data; tables are exact text."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from tda.evaluation.lds import Interval
from tda.evaluation.removal import Summary
from tda.report import figures, names, style, tables
from tda.report.tables import Row

LDS = {
  "gradient_dot": (0.238, 0.22, 0.26),
  "ekfac": (0.5621, 0.55, 0.575),
  "random": (-0.004, -0.02, 0.012),
}
BLUE, RED = (0, 114, 178), (213, 94, 0)
KS = [0, 10, 20]
CURVES = {
  "ekfac": ([0, 1, 2], [0, 0.8, 1.7], [0, 1.2, 2.4]),
  "random": ([0, 0.1, 0.1], [0, 0, 0], [0, 0.2, 0.2]),
}


def pixels(path):
  """uint8 [H, W, 3]."""
  return np.round(image.imread(path)[..., :3] * 255).astype(int)


def count(path, colour, tolerance=4):
  """Pixels of a colour: how much of the figure a series covers."""
  return int((np.abs(pixels(path) - colour).max(-1) <= tolerance).sum())


def blended(colour, alpha):
  return np.round(np.array(colour) * alpha + 255 * (1 - alpha))


def test_lds_bars_are_sorted_and_proportional(tmp_path):
  path = tmp_path / "lds.png"
  figures.lds_bars(path, LDS, ceiling=0.97)
  fill = blended(BLUE, 0.85)
  bar = np.abs(pixels(path) - fill).max(-1) <= 4
  lengths = bar.sum(axis=1)
  rows = np.flatnonzero(lengths > 0.1 * lengths.max())
  groups = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
  first, second = (np.median(lengths[group]) for group in groups[:2])
  # Grid lines and the edges cost a pixel each in a few hundred.
  np.testing.assert_allclose(second / first, 0.238 / 0.562, rtol=0.03)


def test_lds_bars_draw_the_ceiling_only_where_given(tmp_path):
  for name, ceiling in (("without", None), ("with", 0.97)):
    figures.lds_bars(tmp_path / name, LDS, ceiling=ceiling)
  assert count(tmp_path / "with", blended(BLUE, 0.85)) < count(
    tmp_path / "without", blended(BLUE, 0.85)
  )  # the axis reaches further, so the bars are shorter


def test_a_figure_is_the_same_file_again(tmp_path):
  for name in ("a.png", "b.png"):
    figures.lds_bars(tmp_path / name, LDS, ceiling=0.97)
  first, second = (tmp_path / n for n in ("a.png", "b.png"))
  assert first.read_bytes() == second.read_bytes()


def test_predicted_vs_actual_has_a_panel_per_query(tmp_path):
  random = np.random.RandomState(0)
  predicted, actual = random.normal(size=(2, 30, 6))
  sizes = {}
  for queries in (1, 4, 6):
    path = tmp_path / f"{queries}.png"
    figures.predicted_vs_actual(
      path, predicted[:, :queries], actual[:, :queries], ["q"] * queries
    )
    sizes[queries] = pixels(path).shape[:2]
  assert sizes[4][0] == sizes[1][0] < sizes[6][0]
  assert sizes[1][1] < sizes[4][1] == sizes[6][1]
  with pytest.raises(ValueError, match=r"predicted \(30, 6\).*titles \(2\)"):
    figures.predicted_vs_actual(path, predicted, actual, ["a", "b"])


def test_influential_images_chooses_both_ends(tmp_path):
  """Only the extreme examples are coloured, and each has its side."""
  shades = np.full((9, 3, 3, 3), 0.5)
  helpful, harmful = (0.9, 0.2, 0.9), (0.2, 0.9, 0.9)
  shades[7], shades[2] = helpful, harmful
  scores = np.zeros((9, 1))
  scores[7], scores[2] = 3.0, -3.0
  path = tmp_path / "images.png"
  figures.influential_images(
    path,
    np.zeros((1, 3, 3, 1)),
    shades,
    scores,
    query_labels=["a"],
    train_labels=["b"] * 9,
    count=1,
  )
  shown = pixels(path)
  columns = []
  for colour in (helpful, harmful):
    mask = np.abs(shown - np.round(np.array(colour) * 255)).max(-1) <= 2
    assert mask.sum() > 1000
    columns.append(np.flatnonzero(mask.any(axis=0)).mean())
  assert columns[0] < columns[1]
  assert count(path, (128, 128, 128), tolerance=1) < 100
  with pytest.raises(ValueError, match=r"scores \(1, 9\)"):
    figures.influential_images(
      path,
      np.zeros((1, 3, 3)),
      shades,
      scores.T,
      query_labels=["a"],
      train_labels=["b"] * 9,
    )


def test_removal_curves_colour_methods_and_grey_controls(tmp_path):
  path = tmp_path / "removal.png"
  figures.removal_curves(path, KS, CURVES, CURVES)
  grey = (118, 118, 118)
  assert count(path, BLUE) > 1000 and count(path, grey) > 500
  assert count(path, RED) == 0
  figures.removal_curves(path, KS, CURVES, CURVES, controls=())
  assert count(path, RED) > 500
  with pytest.raises(ValueError, match=r"'ekfac'.*shape \(2,\)"):
    figures.removal_curves(path, KS[:2], CURVES, CURVES)
  with pytest.raises(ValueError, match="loss_change is empty"):
    figures.removal_curves(path, KS, {}, CURVES)


def test_removal_curves_of_a_regression_have_one_panel(tmp_path):
  widths = {}
  for name, flipped in (("both", CURVES), ("one", {})):
    figures.removal_curves(tmp_path / name, KS, CURVES, flipped)
    widths[name] = pixels(tmp_path / name).shape[1]
  assert widths["both"] == 2 * widths["one"]


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_spread_by_least_squares(seed):
  """No ordered placement with the gap is nearer: tried at random."""
  random = np.random.RandomState(seed)
  heights = np.sort(random.uniform(2, 8, size=6))
  placed = style.spread(heights, 0.8, -100, 100)
  assert np.diff(placed).min() > 0.8 - 1e-9
  best = np.sum((placed - heights) ** 2)
  for _ in range(300):
    other = np.sort(placed + random.normal(scale=0.3, size=6))
    steps = 0.8 * np.arange(6)
    other = np.maximum.accumulate(other - steps) + steps
    assert np.sum((other - heights) ** 2) >= best
  inside = style.spread([0.0, 0.1, 9.9, 10.0], 1, 0, 10)
  assert inside.min() >= 0 and inside.max() <= 10


@pytest.mark.parametrize(
  ("value", "form", "expected"),
  [
    (-0.0004, "z.3f", "0.000"),
    (-0.25, ".2f", "−0.25"),
    (0.04, "+z#.2g", "+0.040"),
    (-1e-7, "+z#.2g", "−1.0e−07"),
  ],
)
def test_numbers_have_a_true_minus(value, form, expected):
  assert style.number(value, form) == expected


def test_table_as_text():
  rows = [
    Row("random", -0.004, -0.02, 0.012, 0.04),
    Row("EK-FAC", 0.5621, 0.55, 0.575, 12.34, "empirical", "0.1 relative"),
  ]
  expected = """\
method         labels     damping       LDS [low, high]          seconds
-------------  ---------  ------------  -----------------------  -------
EK-FAC         empirical  0.1 relative   0.562 [ 0.550,  0.575]     12.3
random                                  -0.004 [-0.020,  0.012]      0.0
noise ceiling                            0.970"""
  assert tables.text(rows, ceiling=0.97) == expected


def test_table_as_markdown():
  expected = """\
| method | LDS [low, high]         | seconds |
| ------ | ----------------------- | ------: |
| EK-FAC |  0.562 [ 0.550,  0.575] |    12.3 |
| random |  0.000 [-0.020,  0.012] |         |"""
  rows = [
    Row("random", -0.0004, -0.02, 0.012),
    Row("EK-FAC", 0.5621, 0.55, 0.575, 12.34),
  ]
  assert tables.markdown(rows) == expected
  with pytest.raises(ValueError, match="one row or more"):
    tables.text([])


def test_table_of_removals():
  kfac, random = (
    Interval(mean, mean - 0.5, mean + 0.25)
    for mean in (np.array([0, 1.0, 2.0]), np.array([0, 0.125, 0.1]))
  )
  ks = np.array(KS)
  curves = {
    "random": Summary(ks, random, random, 17),
    "kfac": Summary(ks, kfac, kfac, 17),
  }
  block = """\
method   k=10   k=20          at k=20
------  -----  -----  ---------------
K-FAC   1.000  2.000   [1.500, 2.250]
random  0.125  0.100  [-0.400, 0.350]"""
  expected = (
    f"Mean change of the queries' margin without the top k examples\n{block}"
  )
  both = tables.removal(curves, measurement="margin")
  flips = "Fraction of 17 queries no longer predicted right"
  assert both == f"{expected}\n\n{flips}\n{block}"
  regression = {
    name: summary._replace(flipped=None) for name, summary in curves.items()
  }
  assert tables.removal(regression, measurement="margin") == expected
  with pytest.raises(ValueError, match="one method or more"):
    tables.removal({})


def test_names():
  assert names.display("ekfac") == "EK-FAC"
  assert names.display("gradient_cosine") == "gradient cosine"
  assert names.display("same class") == "same class"


def test_import_leaves_matplotlib_alone():
  code = (
    "import sys; import tda.report.figures, tda.data.registry;"
    "assert not {'matplotlib', 'sklearn', 'mlxtend'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"tda-jax\[experiments\]"):
    figures.lds_bars(tmp_path / "lds.png", LDS)
