"""Functions of a curvature against dense solves."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tda.inverse import spectral
from tda.inverse.spectral import Damping

Q = 3
SHAPES = {"plain": (1, 3, 4), "stacked": (2, 2, 3, 4), "rows": (1, 3, 4)}
DAMPINGS = {
  "absolute": spectral.absolute(0.3),
  "relative": spectral.relative(0.2),
}


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def curvature():
  return oracles.drawn_curvature(SHAPES, plain=["rows"])


@pytest.fixture(scope="module")
def vectors():
  rng = np.random.default_rng(1)
  return {k: jnp.asarray(rng.normal(size=(Q, *s))) for k, s in SHAPES.items()}


@pytest.mark.parametrize("kind", DAMPINGS)
def test_the_inverse_is_a_dense_solve(curvature, vectors, kind):
  response = spectral.inverse(curvature, DAMPINGS[kind])
  assert response.damping == DAMPINGS[kind]
  assert response.labels == curvature.labels
  found = oracles.flat(response(vectors))
  value = DAMPINGS[kind].value
  deltas = oracles.damping(curvature, value)
  for name, matrix in oracles.explicit(curvature).items():
    delta = deltas[name] if kind == "relative" else value
    damped = matrix + delta * np.eye(len(matrix))
    v = np.asarray(vectors[name]).reshape(Q, -1)
    expected = np.linalg.solve(damped, v.T).T
    np.testing.assert_allclose(found[name], expected, rtol=1e-10, atol=1e-12)


def test_any_function_of_the_eigenvalues(curvature, vectors):
  root = spectral.response(curvature, jnp.sqrt)
  twice = oracles.flat(root(root(vectors)))
  for name, matrix in oracles.explicit(curvature).items():
    v = np.asarray(vectors[name]).reshape(Q, -1)
    np.testing.assert_allclose(twice[name], v @ matrix, atol=1e-12)


def test_without_damping_it_is_a_pseudo_inverse(curvature, vectors):
  """Eigenvalues that rounding left above zero count as zero."""
  cut = lambda x: jnp.where(x < jnp.median(x), 1e-17, x)
  flat = curvature._replace(
    eigenvalues=jax.tree.map(cut, curvature.eigenvalues)
  )
  found = oracles.flat(spectral.inverse(flat, spectral.absolute(0))(vectors))
  for name, matrix in oracles.explicit(flat).items():
    v = np.asarray(vectors[name]).reshape(Q, -1)
    expected = v @ np.linalg.pinv(matrix, rcond=1e-12)
    np.testing.assert_allclose(found[name], expected, atol=1e-9)


def test_a_layer_without_gradient_gets_no_response(curvature, vectors):
  dead = {k: 0 * x for k, x in curvature.eigenvalues.items()}
  response = spectral.inverse(
    curvature._replace(eigenvalues=dead), spectral.relative()
  )
  for x in response(vectors).values():
    np.testing.assert_array_equal(x, 0)


def test_a_response_is_an_argument_of_jit(curvature, vectors):
  response = spectral.inverse(curvature, spectral.relative())
  staged = jax.jit(lambda r, v: r(v))(response, vectors)
  for name, x in response(vectors).items():
    np.testing.assert_allclose(staged[name], x, atol=1e-12)


@pytest.mark.parametrize("make", [spectral.absolute, spectral.relative])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_dampings_are_refused(make, value):
  with pytest.raises(ValueError, match=f"got {value}"):
    make(value)


def test_relative_damping_is_of_each_layers_mean():
  values = jnp.asarray([[[[1.0, 3.0]]], [[[10.0, 30.0]]]])
  found = Damping("relative", 0.5).of(values)
  np.testing.assert_allclose(found.reshape(-1), [1.0, 10.0])


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("0.01", spectral.absolute(0.01)),
    ("0.1 relative", spectral.relative(0.1)),
    ("1e-05 relative", spectral.relative(1e-5)),
  ],
)
def test_dampings_are_written_and_read(text, expected):
  assert spectral.damping(text) == expected
  assert str(expected) == text


@pytest.mark.parametrize(
  "text", ["0.1 of it", "small", "-1", "nan relative", ""]
)
def test_what_is_no_damping_is_refused(text):
  with pytest.raises(ValueError, match=f"damping '{text}' is not a number"):
    spectral.damping(text)
