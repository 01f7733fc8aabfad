"""Stores the projected gradients of a corpus, to be asked many times.

  python -m experiments.build_store --config=configs/store.py

Trains the model if none is given, and writes a row for each document to
WORKDIR/store (`tda.store`). A run that was stopped goes on where it was;
`experiments.query` asks.
"""

import pathlib
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import language, store_task
from tda import streams
from tda.store import disk, layout

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/store.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/build_store/CONFIG unless given."
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  setting = _CONFIG.value
  default = pathlib.Path("workdir/build_store", setting.name)
  path = _WORKDIR.value or str(default)
  devices = jax.device_count()
  print(f"{devices} {jax.default_backend()} device(s); results in {path}")
  run = store_task.opened(setting, path)
  mesh = language.mesh(setting)
  loop = streams.Loop(setting.batch_size, "gradients", mesh)
  log = store_task.logger(run, loop)
  started = time.monotonic()
  store = log.build(
    run.store,
    run.model.params,
    run.corpus.rows,
    dtype=setting.kept,
    names=run.task.names,
    per_shard=setting.per_shard or None,
    loop=loop,
  )
  seconds = time.monotonic() - started
  tokens = int(run.corpus.rows["mask"].sum())
  size = sum(x.stat().st_size for x in store.path.rglob("c/*/0"))
  found = {
    "rows": store.rows,
    "numbers of a row": layout.width(store.layout),
    "bytes": size,
    "parameters": sum(x.size for x in jax.tree.leaves(run.model.params)),
    "tokens": tokens,
    "tokens a second": tokens / seconds,
  }
  run.workdir.record("store", found)
  for name, value in found.items():
    print(f"{name:20} {value:,.0f}")
  for span in store.layout:
    print(
      f"  {span.name:36} {span.modules:4} modules of {span.outputs} x"
      f" {span.inputs}"
    )
  complete = disk.opened(run.store).complete
  print(f"\n{'whole' if complete else 'begun'}; ask it with")
  print(f"  python -m experiments.query --store={path}")


if __name__ == "__main__":
  app.run(main)
