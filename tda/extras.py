"""Packages that `import tda` does without, imported where they are used."""

import importlib
from types import ModuleType


def package(name: str, use: str, extra: str) -> ModuleType:
  """Imports a package.

  Args:
    name: of the package or one of its modules.
    use: what needs it, as the beginning of a sentence.
    extra: that brings it.

  Raises:
    ImportError: naming the extra.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f'{use} needs {name} ({error}): pip install "tda-jax[{extra}]"'
    ) from error
