"""Ranking measures, against scikit-learn, counting and closed forms."""

import itertools

import numpy as np
import pytest
from sklearn import metrics

from tda.evaluation import ranking
from tda.evaluation.ranking import (
  average_precision,
  recall_at,
  reciprocal_rank,
)

SEEDS = (0, 1, 2)
DOCUMENTS, QUERIES = 40, 6
MEASURES = {
  "recall": lambda s, r: recall_at(s, r, 3),
  "reciprocal": reciprocal_rank,
  "precision": average_precision,
}


def case(seed, share=0.2):
  """Scores without ties and relevant documents, one or more a query."""
  rng = np.random.default_rng(seed)
  relevant = rng.random((DOCUMENTS, QUERIES)) < share
  relevant[rng.integers(DOCUMENTS), :] = True
  return rng.normal(size=relevant.shape), relevant


@pytest.mark.parametrize("seed", SEEDS)
def test_as_counted(seed):
  scores, relevant = case(seed)
  for q in range(QUERIES):
    best = np.argsort(-scores[:, q])
    hits = relevant[best, q]
    expected = metrics.average_precision_score(relevant[:, q], scores[:, q])
    found = average_precision(scores, relevant)[q]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert reciprocal_rank(scores, relevant)[q] == 1 / (1 + np.argmax(hits))
    for k in (1, 5, DOCUMENTS):
      share = sum(hits[:k]) / min(k, sum(hits))
      assert recall_at(scores, relevant, k)[q] == share


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_ties_are_the_worst_order(measure, seed):
  """The least over all orders of the documents of equal score."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 2, (6, 1)).astype(np.float32)
  relevant = np.array([[1], [0], [1], [0], [0], [1]], bool)
  orders = itertools.permutations(np.linspace(0, 0.5, 6))
  values = [measure(scores + np.array(x)[:, None], relevant) for x in orders]
  np.testing.assert_array_equal(measure(scores, relevant), np.min(values, 0))


def test_constant_scores_rank_last_and_perfect_ones_first():
  _, relevant = case(0)
  count = relevant.sum(0)
  for constant in (0.0, 1e30, -np.inf):
    scores = np.full(relevant.shape, constant)
    np.testing.assert_array_equal(recall_at(scores, relevant, 5), 0)
    last = reciprocal_rank(scores, relevant)
    np.testing.assert_array_equal(last, 1 / (DOCUMENTS - count + 1))
    assert np.all(average_precision(scores, relevant) <= count / DOCUMENTS)
  for measure in MEASURES.values():
    np.testing.assert_array_equal(measure(1.0 * relevant, relevant), 1)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_invariances(measure):
  scores, relevant = case(0)
  value = measure(scores, relevant)
  assert value.shape == (QUERIES,)
  order = np.random.default_rng(1).permutation(DOCUMENTS)
  for same in (
    measure(scores[order], relevant[order]),
    measure(np.exp(scores), relevant),
    np.hstack([measure(scores[:, [q]], relevant[:, [q]]) for q in range(6)]),
  ):
    np.testing.assert_allclose(same, value, rtol=1e-14)
  assert np.all(measure(np.where(relevant, scores, -np.inf), relevant) == 1)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_refuses(measure):
  scores, relevant = case(0)
  with pytest.raises(ValueError, match=r"\(6, 40\).*\(40, 6\).*transpose"):
    measure(scores.T, relevant)
  with pytest.raises(ValueError, match=r"\(40,\) .* must both be"):
    measure(scores[:, 0], relevant[:, 0])
  with pytest.raises(ValueError, match="bool, got int64: compare"):
    measure(scores, relevant.astype(np.int64))
  scores[3, 2] = np.nan
  with pytest.raises(
    ValueError, match=r"1 scores are NaN.*document 3 and q.* 2"
  ):
    measure(scores, relevant)
  relevant[:, 4] = False
  with pytest.raises(ValueError, match=r"1 queries have no .* 4: leave them"):
    measure(np.zeros(relevant.shape), relevant)


@pytest.mark.parametrize("k", [0, -1, DOCUMENTS + 1])
def test_refuses_k(k):
  with pytest.raises(ValueError, match=f"k = {k} of 40 documents: take"):
    recall_at(*case(0), k)


def test_means_are_of_the_queries():
  scores, relevant = case(0)
  k = int(relevant.sum(0).max())
  assert ranking.means(scores, relevant) == {
    f"recall@{k}": recall_at(scores, relevant, k).mean(),
    "MRR": reciprocal_rank(scores, relevant).mean(),
    "mean precision": average_precision(scores, relevant).mean(),
  }
