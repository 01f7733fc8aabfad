"""Lexical scores against dictionaries and loops; what a filter keeps."""

import collections
import math

import numpy as np
import pytest

from tda.data.retrieval import bm25, candidates, recall, tfidf

DOCUMENTS = [np.array(x) for x in ([7, 7, 9], [7, 4], [5, 4, 4, 4, 4])]


def plain(documents, queries, weight):
  """[D, Q] by the formula, weight(count, length, mean length)."""
  counts = [collections.Counter(x.tolist()) for x in documents]
  mean = sum(len(x) for x in documents) / len(documents)
  scores = np.zeros((len(documents), len(queries)))
  for q, query in enumerate(queries):
    for d, inside in enumerate(counts):
      for t in query.tolist():
        n = sum(t in other for other in counts)
        idf = math.log((len(documents) - n + 0.5) / (n + 0.5) + 1)
        if inside[t]:
          scores[d, q] += weight(inside[t], len(documents[d]), mean) * idf
  return scores


@pytest.fixture(params=[0, 1, 2])
def corpus(request):
  rng = np.random.default_rng(request.param)
  draw = lambda size: rng.zipf(1.3, size).clip(max=60).astype(np.int32)
  return [draw(n) for n in rng.integers(0, 30, 40)], [
    draw(n) for n in (1, 5, 9)
  ]


def test_scores_are_those_of_the_formulas(corpus):
  expected = plain(*corpus, lambda count, *_: 2.5 / 2.5)
  scores = tfidf(*corpus)
  assert scores.dtype == np.float32
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
  np.testing.assert_array_equal(tfidf(*corpus, k1=7), scores)

  def okapi(count, length, mean):
    return 3 * count / (2 * (0.4 + 0.6 * length / mean) + count)

  np.testing.assert_allclose(
    bm25(*corpus, k1=2, b=0.6), plain(*corpus, okapi), rtol=1e-6
  )
  np.testing.assert_allclose(bm25(*corpus, k1=0), scores, rtol=1e-6)


def test_by_hand():
  """IDF log 8/5 of 7 and 4 in two documents of three, log 8/3 of 9 in one."""
  queries = [np.array([7]), np.array([4, 9, 4]), np.array([8])]
  two, one = math.log(8 / 5), math.log(8 / 3)
  expected = np.array([[two, one, 0], [two, 2 * two, 0], [0, 2 * two, 0]])
  np.testing.assert_allclose(tfidf(DOCUMENTS, queries), expected, rtol=1e-6)
  # The lengths are 3, 2 and 5, a mean of 10/3; k1 = 1 and b = 1.
  factors = np.array(
    [[4 / 2.9, 2 / 1.9, 1], [2 / 1.6, 2 / 1.6, 1], [1, 8 / 5.5, 1]]
  )
  np.testing.assert_allclose(
    bm25(DOCUMENTS, queries, 1, 1), factors * expected, rtol=1e-6
  )


@pytest.mark.parametrize("score", [tfidf, bm25])
def test_order_does_not_matter(corpus, score):
  documents, queries = corpus
  rng = np.random.default_rng(3)
  order, turn = rng.permutation(len(documents)), [2, 0, 1]
  mixed = score(
    [rng.permutation(documents[i]) for i in order],
    [rng.permutation(queries[i]) for i in turn],
  )
  np.testing.assert_array_equal(mixed, score(*corpus)[order][:, turn])


@pytest.mark.parametrize("score", [tfidf, bm25])
def test_documents_without_tokens_score_nothing(score):
  assert not score([[], []], [[3, 4]]).any()
  np.testing.assert_array_equal(
    score([[3], []], [[3]])[:, 0] > 0, [True, False]
  )


def test_candidates_are_best_first_and_ties_by_place():
  scores = np.array([[1, 5], [3, 5], [3, 9], [0, -1]])
  assert candidates(scores, 3).T.tolist() == [[1, 2, 0], [2, 0, 1]]
  assert candidates(scores, 4)[-1].tolist() == [3, 3]


def test_recall():
  reference = np.array([[9, 0], [8, 1], [7, 2], [0, 9]])
  scores = np.array([[0, 0], [5, 0], [4, 0], [3, 0]])
  # Best two: 0 and 1, 3 and 2; kept two: 1 and 2, and by ties 0 and 1.
  assert recall(scores, reference, 2, 2).tolist() == [0.5, 0]
  assert recall(scores, reference, 2, 3).tolist() == [0.5, 0.5]
  assert recall(scores, reference, 2, 4).tolist() == [1, 1]
  assert recall(reference, reference, 3, 1).tolist() == [1 / 3, 1 / 3]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: tfidf([], [[1]]), "0 documents and 1 queries: give one or more"),
    (lambda: tfidf([[1]], []), "1 documents and 0 queries"),
    (lambda: bm25([[1]], [[1], []]), "1 of 2 .* at 1: leave them out"),
    (lambda: tfidf([[0.5]], [[1]]), "float64 .* must be integers.*encode"),
    (lambda: tfidf([[[1, 2]]], [[1]]), r"\(1, 2\) must be .* one dimension"),
    (lambda: bm25([[1]], [[1]], k1=-1), "k1=-1 must be 0 or more"),
    (lambda: bm25([[1]], [[1]], b=1.5), "b=1.5 from 0 to 1"),
    (lambda: candidates(np.ones((3, 1)), 0), "best 0 of 3 .* 1 or more"),
    (lambda: candidates(np.ones((3, 1)), 4), "best 4 of 3 .* at most"),
    (lambda: candidates(np.ones(3), 1), r"\(3,\) must be \[documents"),
    (lambda: candidates(np.array([[np.nan]]), 1), "finite"),
    (lambda: recall(np.ones((3, 1)), np.ones((3, 2)), 1, 1), r"\(3, 2\) must"),
    (lambda: recall(np.ones((3, 1)), np.ones((3, 1)), 1, 4), "best 4 of 3"),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()
