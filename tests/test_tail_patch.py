"""One step on a document, against the same step taken by hand."""

import jax
import numpy as np
import optax
import pytest
import store_cases

from tda.evaluation.tail_patch import tail_patch
from tda.streams import Loop

FOUND = np.array([[3, 0], [7, 7], [1, 22]])


def patch(optimizer, **options):
  loss, params = store_cases.OBJECTIVE.loss, store_cases.model()
  train, queries = store_cases.data(), store_cases.data(3, 9)
  return tail_patch(
    loss, loss, params, train, queries, FOUND, optimizer, **options
  )


@pytest.mark.parametrize("make", [optax.sgd, optax.adam])
def test_it_is_what_a_step_does(make):
  loss, params = store_cases.OBJECTIVE.loss, store_cases.model()
  train, queries = store_cases.data(), store_cases.data(3, 9)
  optimizer = make(0.05)
  got = patch(optimizer, loop=Loop(4))
  for q, places in enumerate(FOUND):
    query = {k: x[q] for k, x in queries.items()}
    for i, place in enumerate(places):
      document = {k: x[place] for k, x in train.items()}
      grads = jax.grad(loss)(params, document)
      updates, _ = optimizer.update(grads, optimizer.init(params), params)
      after = optax.apply_updates(params, updates)
      want = loss(params, query) - loss(after, query)
      np.testing.assert_allclose(got[q, i], want, rtol=1e-4, atol=1e-6)
  assert (got[1, 0] == got[1, 1]) and np.abs(got).min() > 0


def test_small_steps_are_products_of_gradients():
  train, asked = (
    store_cases.dense(x) for x in (store_cases.data(), store_cases.data(3, 9))
  )
  flat = lambda g: np.concatenate(
    [np.asarray(x).reshape(len(x), -1) for x in g.values()], axis=1
  )
  want = flat(asked) @ flat(train).T
  got = patch(optax.sgd(1e-3)) / 1e-3
  np.testing.assert_allclose(
    got, np.take_along_axis(want, FOUND, 1), rtol=0.05, atol=0.05
  )


def test_the_state_of_training_counts():
  optimizer = optax.sgd(0.05, momentum=0.9)
  params = store_cases.model()
  state = optimizer.init(params)
  moved = jax.tree.map(lambda x: x + 1.0, state)
  assert (
    np.abs(patch(optimizer, opt_state=moved) - patch(optimizer)).max() > 0.01
  )


def test_places_that_are_not_there_are_refused():
  loss, params = store_cases.OBJECTIVE.loss, store_cases.model()
  train, queries = store_cases.data(), store_cases.data(3, 9)
  for found in (FOUND[:2], FOUND + 20, FOUND[0], FOUND - 1):
    with pytest.raises(ValueError, match="for 3 queries among 23"):
      tail_patch(loss, loss, params, train, queries, found, optax.sgd(1))
