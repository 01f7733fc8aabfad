"""Tables of results, as aligned text for a terminal or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tda.evaluation.lds import Interval
from tda.evaluation.removal import Summary
from tda.report.names import display


class Row(NamedTuple):
  """One method's result. Columns that no row fills are left out."""

  method: str
  mean: float  # linear datamodeling score, mean over queries
  low: float  # ends of its interval
  high: float
  seconds: float | None = None  # fitting and scoring, without retraining
  labels: str = ""  # of the curvature: "empirical", "sampled", "exact"
  damping: str = ""  # with its scale, as "0.1 relative"
  note: str = ""  # what a solver could not do
  models: int = 1  # whose scores it is the mean of


def text(rows: Sequence[Row], *, ceiling: float | None = None) -> str:
  """Columns aligned with blanks, best method first, the ceiling last."""
  return aligned(*_cells(rows, ceiling))


def markdown(rows: Sequence[Row], *, ceiling: float | None = None) -> str:
  """The same table for a README; numbers are aligned to the right."""
  header, body, right = _cells(rows, ceiling)
  widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
  widths = [max(width, 3) for width in widths]
  rule = [
    "-" * (width - 1) + ":" if is_right else "-" * width
    for width, is_right in zip(widths, right, strict=True)
  ]
  return "\n".join(
    f"| {' | '.join(_padded(cells, widths, right))} |"
    for cells in (header, rule, *body)
  )


def removal(curves: Mapping[str, Summary], *, measurement: str = "loss") -> str:
  """What retraining without the top k examples does, a row per method.

  One block for the change of the measurement, and for classification one for
  the fraction of queries no longer predicted right. Strongest method first,
  with the interval at the largest k.
  """
  if not curves:
    raise ValueError("a table of removals needs one method or more")
  changes = {method: summary.change for method, summary in curves.items()}
  flips = {m: s.flipped for m, s in curves.items() if s.flipped is not None}
  first = next(iter(curves.values()))
  ks = [int(k) for k in first.ks]
  blocks = [
    f"Mean change of the queries' {measurement} without the top k examples",
    _removal_block(changes, ks),
  ]
  if flips:
    blocks += [
      "",
      f"Fraction of {first.eligible} queries no longer predicted right",
      _removal_block(flips, ks),
    ]
  return "\n".join(blocks)


def _removal_block(curves: Mapping[str, Interval], ks: Sequence[int]) -> str:
  """Means at every k above 0, where nothing has changed."""
  shown = [i for i, k in enumerate(ks) if k]
  ranked = sorted(curves, key=lambda m: float(curves[m].mean[-1]), reverse=True)
  body = []
  for method in ranked:
    mean, low, high = (np.asarray(part, float) for part in curves[method])
    numbers = [f"{mean[i]:z.3f}" for i in shown]
    interval = f"[{low[-1]:z.3f}, {high[-1]:z.3f}]"
    body.append([display(method), *numbers, interval])
  header = ["method", *(f"k={ks[i]}" for i in shown), f"at k={ks[-1]}"]
  return aligned(header, body, [False, *[True] * (len(header) - 1)])


def aligned(
  header: Sequence[str],
  body: Sequence[Sequence[str]],
  right: Sequence[bool] | None = None,
) -> str:
  """Any table, its columns to the left unless `right` says otherwise."""
  right = right or [False] * len(header)
  widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
  rule = ["-" * width for width in widths]
  return "\n".join(
    "  ".join(_padded(cells, widths, right)).rstrip()
    for cells in (header, rule, *body)
  )


def _cells(
  rows: Sequence[Row], ceiling: float | None
) -> tuple[list[str], list[list[str]], list[bool]]:
  """Header, body, and whether each column is aligned to the right."""
  if not rows:
    raise ValueError("a table of results needs one row or more")
  ranked = sorted(rows, key=lambda row: row.mean, reverse=True)
  columns = [
    ("method", False, [display(row.method) for row in ranked], "noise ceiling"),
    ("labels", False, [row.labels for row in ranked], ""),
    ("damping", False, [row.damping for row in ranked], ""),
    (
      "LDS [low, high]",
      False,
      [_interval(row) for row in ranked],
      "" if ceiling is None else f"{ceiling:z6.3f}",
    ),
    ("models", True, [_models(row.models) for row in ranked], ""),
    ("seconds", True, [_seconds(row.seconds) for row in ranked], ""),
    ("unsolved queries", False, [row.note for row in ranked], ""),
  ]
  kept = [column for column in columns if any(column[2])]
  body = [list(cells) for cells in zip(*(c[2] for c in kept), strict=True)]
  if ceiling is not None:
    body.append([column[3] for column in kept])
  return [c[0] for c in kept], body, [c[1] for c in kept]


def _interval(row: Row) -> str:
  """Six characters a number, so that the signs leave the digits aligned."""
  return f"{row.mean:z6.3f} [{row.low:z6.3f}, {row.high:z6.3f}]"


def _models(models: int) -> str:
  return str(models) if models > 1 else ""


def _seconds(seconds: float | None) -> str:
  return "" if seconds is None else f"{seconds:.1f}"


def _padded(
  cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]
) -> list[str]:
  return [
    cell.rjust(width) if is_right else cell.ljust(width)
    for cell, width, is_right in zip(cells, widths, right, strict=True)
  ]
