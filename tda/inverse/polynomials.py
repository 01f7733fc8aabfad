"""Polynomials of a residual, in few products of matrices.

A step X ← X S(R) of an iteration for A⁻¹, with R = I − A X, makes the residual
P(R) = 1 − (1 − R) S(R), for any polynomial S. If the eigenvalues of R are known
to lie within ± w, the largest of P is smallest for

    P(R) = T_p(R / w) / T_p(1 / w),    w -> 1 / T_p(1 / w),

with Chebyshev's T_p; it tends to Rᵖ, the power of hyperpower, as w → 0. In
(w, 1) it is between that and 1, so that eigenvalues beyond w converge too.
"""

import itertools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from numpy.polynomial import chebyshev

Array = jax.Array
Product: TypeAlias = Callable[[Array, Array], Array]

ORDERS = range(2, 10)


def products(order: int) -> int:
  """Products of D×D matrices in an iteration."""
  check(order)
  return 5 if order == 9 else order


def factor(
  order: int, r: Array, width: Array, times: Product
) -> tuple[Array, Array, Array]:
  """S(R), apart from its constant term, which needs no product.

  Args:
    order: p.
    r: R, [..., D, D].
    width: w, [...]; 0 gives powers.
    times: the product of matrices.

  Returns:
    The constant term [...], the others [..., D, D], and the largest |P| within
    ± w, which is the next width [...].
  """
  terms = chebyshev.cheb2poly([0] * order + [1])
  a = [float(terms[j]) * width ** (order - j) for j in range(order + 1)]
  *sums, total = itertools.accumulate(a[::-1], jnp.add)
  s = [partial / total for partial in sums[::-1]]
  rest = _ninth(r, s, times) if order == 9 else _horner(r, s, times)
  return s[0], rest, width**order / total


def _horner(r: Array, s: list[Array], times: Product) -> Array:
  """s₁ R + … + sₚ₋₁ Rᵖ⁻¹ in p − 2 products."""
  found = scaled(s[-1], r)
  for coefficient in s[-2:0:-1]:
    found = times(r, found) + scaled(coefficient, r)
  return found


def _ninth(r: Array, s: list[Array], times: Product) -> Array:
  """s₁ R + … + s₈ R⁸ in three products.

  With U = R² and Z = U (U + R / 2) + a U + b R it is, up to the factor s₈,
  (Z + c U) (Z − c U) + d (Z − a U − b R) + e U + s₁ R. Comparing coefficients
  gives a to e, and c is real, because s₈ = s₇, s₆ = s₅, s₄ = s₃ and s₂ = s₁ for
  the odd polynomials P of order nine.
  """
  six, four, two = (s[k] / s[8] for k in (6, 4, 2))
  a = (six - 0.25) / 2
  b = (six / 2 + 0.125) / 2
  square = jnp.maximum(four - 4 * a * b + b + a * a, 0)  # c²
  d = four - a * a + square - b
  u = times(r, r)
  v = times(u, u + 0.5 * r)
  z = v + scaled(a, u) + scaled(b, r)
  c = scaled(jnp.sqrt(square), u)
  found = times(z + c, z - c) + scaled(d, v)
  return scaled(s[8], found + scaled(two - b * b, u) + scaled(two, r))


def scaled(weights: Array, a: Array) -> Array:
  """weights [...] times a [..., D, D]."""
  return weights[..., None, None] * a


def check(order: int) -> None:
  """Refuses an order that has no step."""
  if order not in ORDERS:
    raise ValueError(
      f"order must be 2 to 9 (2 is Schulz's), got {order}: at least the first"
      " power of the residual is needed, and rounding ruins the high ones"
    )
