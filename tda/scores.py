"""Scores that carry their meaning."""

from typing import NamedTuple

import numpy as np

from tda.curvature.labels import Labels
from tda.inverse.iterative import Info
from tda.inverse.spectral import Damping

SIGN = "positive: leaving the training example out raises the measurement"


class Scores(NamedTuple):
  """How much each training example matters to each query.

  Attributes:
    values: [N, Q] for pairs, [N] for self-influence; of segments [N, P, Q] and
      [N, P], of tokens [N, T, Q]; float32.
    method: what computed them.
    unit: what a score of 1 means.
    normaliser: what the product of gradients was divided by: the number of
      training examples for predicted changes, 1 for mere similarities.
    damping: of the inverse; None for methods that have none.
    labels: of the curvature; None for methods that have none.
    coverage: share of the parameters that is attributed, 0 to 1.
    by_site: {block: [N, *stack, Q]}, which add up to `values`; None unless
      asked for.
    shares: what scores are of: "rows", or "segments" or "tokens" of them.
    info: how the solve of each query ended; None for methods that do not
      iterate.
    sign: what a positive score means.
  """

  values: np.ndarray
  method: str
  unit: str
  normaliser: int
  damping: Damping | None = None
  labels: Labels | None = None
  coverage: float = 1.0
  by_site: dict[str, np.ndarray] | None = None
  shares: str = "rows"
  info: Info | None = None
  sign: str = SIGN


CHANGE = "predicted change of the measurement when the example is left out"
SIMILARITY = "similarity; only the order is meaningful"
