"""What every experiment binary starts with: flags, setting, working folder."""

import dataclasses
import pathlib

import jax
from absl import flags, logging
from ml_collections import config_flags

from tda.evaluation import settings
from tda.evaluation.settings import Setting
from tda.evaluation.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; its fields are flags too: --config.epochs=5"
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/BINARY/CONFIG unless given."
)
_SEED = flags.DEFINE_integer("seed", None, "Instead of the config's seed.")
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder with the data set's files, for sets that need one."
)


def setting() -> Setting:
  """The config file's setting with the flags' changes."""
  if _CONFIG.value is None:
    raise ValueError("give an experiment: --config=configs/digits_mlp.py")
  chosen = settings.from_config(_CONFIG.value.to_dict())
  if _SEED.value is not None:
    chosen = dataclasses.replace(chosen, seed=_SEED.value)
  if _DATA_DIR.value is not None:
    chosen = dataclasses.replace(chosen, data_dir=_DATA_DIR.value)
  return chosen


def workdir(binary: str, chosen: Setting) -> Workdir:
  """The folder of the run, which holds its config from now on."""
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  default = pathlib.Path("workdir", binary, chosen.name)
  folder = _WORKDIR.value or str(default)
  devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
  process = f"process {jax.process_index()} of {jax.process_count()}"
  print(f"{process}, {devices}; results in {folder}")
  return Workdir(folder, dataclasses.asdict(chosen))
