"""What methods are called in figures and tables."""

_NAMES = {
  "ekfac": "EK-FAC",
  "gradient_dot": "gradient dot product",
  "kfac": "K-FAC",
}


def display(method: str) -> str:
  """As papers write it; of a name not known here only underscores go."""
  return _NAMES.get(method, method.replace("_", " "))
