"""Methods of an experiment that are from stores."""

import pytest

from tda.evaluation import stored
from tda.report.names import display


def test_methods_of_stores_are_known_by_their_names():
  methods = ("ekfac", "logra random 8", "trak", "logra principal 16")
  assert stored.named(methods) == ["logra random 8", "logra principal 16"]
  assert display("logra random 8") == "LoGra random 8"
  assert display("gradient_dot") == "gradient dot product"
  for name in ("logra", "logra dense 8", "logra random x", "logra random 8 9"):
    with pytest.raises(ValueError, match="write 'logra KIND K'"):
      stored.named([name])
