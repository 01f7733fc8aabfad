"""What queries have in common, on scores that are known."""

import numpy as np
import pytest

from tda.evaluation import procedural

TASKS = ["sums", "sums", "facts"]


def test_equal_queries_correlate_and_shuffled_ones_do_not():
  rng = np.random.default_rng(0)
  one = rng.normal(size=4000)
  scores = np.stack([one, 3 * one + 1, rng.permutation(one), 0 * one], axis=1)
  matrix = procedural.correlations(scores)
  np.testing.assert_allclose(
    matrix[:3, :3], np.corrcoef(scores[:, :3].T), atol=1e-9
  )
  assert matrix[0, 1] == pytest.approx(1)
  assert abs(matrix[0, 2]) < 4 / np.sqrt(4000)
  np.testing.assert_array_equal(matrix[3], 0)


def test_means_between_tasks_leave_a_query_itself_out():
  matrix = np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]])
  found = procedural.between(matrix, TASKS)
  assert found["sums"]["sums"] == pytest.approx(0.8)
  assert found["sums"]["facts"] == found["facts"]["sums"] == pytest.approx(0.2)
  assert np.isnan(found["facts"]["facts"])


def test_the_slope_of_a_power_law_is_its_exponent():
  law = np.arange(1, 501.0) ** -0.36
  rng = np.random.default_rng(1)
  scores = np.stack([rng.permutation(law), 7 * rng.permutation(law), -law], 1)
  np.testing.assert_allclose(
    procedural.slope(scores, 100), [-0.36, -0.36, np.nan], rtol=1e-6
  )


def test_answers_are_looked_for_in_any_case_and_spacing():
  texts = ["It is  Forty\nTwo.", "nothing", "forty-two"]
  right = procedural.holds(texts, ["forty two", None, "thing"])
  np.testing.assert_array_equal(
    right, [[True, False, False], [False, False, True], [False, False, False]]
  )


def test_answers_among_the_first_and_by_chance():
  rng = np.random.default_rng(2)
  scores = rng.normal(size=(12, 3))
  right = np.zeros((12, 3), bool)
  right[scores[:, 0].argmax(), 0] = right[scores[:, 1].argmin(), 1] = True
  found = procedural.found(scores, right, 3)
  assert found == {"queries": 2, "found": 0.5, "chance": pytest.approx(3 / 12)}
  right[:10, 1] = True  # with ten of twelve right, three cannot all be wrong
  chance = procedural.found(scores, right, 3)["chance"]
  assert chance == pytest.approx((3 / 12 + 1) / 2)
  none = procedural.found(scores, np.zeros((12, 3), bool), 3)
  assert none["queries"] == 0 and np.isnan(none["found"])


def test_random_rankings_hold_kinds_as_often_as_the_corpus():
  rng = np.random.default_rng(3)
  kinds = ["a"] * 300 + ["b"] * 100
  scores = rng.normal(size=(400, 200))
  found = procedural.multipliers(scores, kinds, 20)
  for kind, share in (("a", 0.75), ("b", 0.25)):
    error = np.sqrt((1 - share) / share / 20 / 200)
    assert abs(found[kind].mean() - 1) < 4 * error
  best = np.where(np.array(kinds) == "b", 1.0, 0.0)[:, None]
  assert procedural.multipliers(best, kinds, 20)["b"] == 4


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda s: procedural.correlations(s[0]), "must be finite"),
    (lambda s: procedural.correlations(s * np.nan), "must be finite"),
    (lambda s: procedural.between(s, TASKS), "of 3 queries"),
    (lambda s: procedural.slope(s, 9), "a slope of 9 of 5"),
    (lambda s: procedural.found(s, s[:2] > 0, 2), r"documents with the answer"),
    (lambda s: procedural.multipliers(s, ["a"], 2), "1 kinds of 5"),
  ],
)
def test_what_cannot_be_computed_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.ones((5, 2)))
