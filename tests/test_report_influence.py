"""Figures of influence on language models show what they are given."""

import numpy as np
import pytest
from matplotlib import image

from tda.evaluation import tails
from tda.report import influence

BLUE = (0, 114, 178)


def pixels(path):
  return np.round(image.imread(path)[..., :3] * 255).astype(int)


def covered(path, colour):
  return int((np.abs(pixels(path) - colour).max(-1) <= 4).sum())


def test_tails_draw_a_line_for_each_query_and_for_its_fit(tmp_path):
  rng = np.random.default_rng(0)
  scores = rng.pareto(1.5, (200, 2)) - 0.2
  fit = tails.pareto(scores[:, 0], count=20)
  one, two, bare = (tmp_path / f"{i}.png" for i in range(3))
  influence.tail(one, scores[:, :1], [fit], ["costs $5 and $6"])
  influence.tail(two, scores, [fit, None], ["a", "b"])
  influence.tail(bare, scores[:, :1], [None], ["costs $5 and $6"])
  assert covered(one, BLUE) > 200 and covered(two, (213, 94, 0)) > 200
  assert covered(one, (34, 34, 34)) > covered(bare, (34, 34, 34))
  with pytest.raises(ValueError, match="1 labels and 2 fits"):
    influence.tail(one, scores, [fit, None], ["a"])


def test_layers_are_darker_where_influence_is(tmp_path):
  path = tmp_path / "layers.png"
  shares = np.array([[0.9, 0.1], [0.1, 0.9]])
  influence.layers(path, shares, ["first", "second"])
  picture = pixels(path)
  dark = np.array((8, 48, 107))  # the largest share's
  rows, columns = np.nonzero(np.abs(picture - dark).max(-1) <= 4)
  middle = columns < np.median(columns)
  first, second = rows[middle].mean(), rows[~middle].mean()
  assert first < second  # the first query's is in the first layer, above
  with pytest.raises(ValueError, match=r"\(2, 2\) must be .* 1 of them"):
    influence.layers(path, shares, ["first"])
