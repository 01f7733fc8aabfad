"""Stores the projected gradients of a corpus, to be asked many times.

  python -m experiments.build_store --config=configs/store.py

Trains the model if none is given, and writes a row for each document to
WORKDIR/store (`tda.store`). A run that was stopped goes on where it was;
`experiments.query` asks.
"""

import pathlib
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments import language, reports, store_task
from tda import streams
from tda.report import tables
from tda.store import layout

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/store.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/build_store/CONFIG unless given."
)


def main(_) -> None:
  setting = _CONFIG.value
  path = language.begun("build_store", setting, _WORKDIR.value)
  run = store_task.opened(setting, path)
  mesh = language.mesh(setting)
  loop = streams.Loop(setting.batch_size, "gradients", mesh)
  log = store_task.logger(run, loop)
  anew, started = not pathlib.Path(run.store).exists(), time.monotonic()
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
  }
  if anew:  # else a part of it may have been there
    found["tokens a second"] = tokens / seconds
  run.workdir.record("store", found)
  known = run.workdir.metrics()["store"]
  body = [[name, f"{value:,.0f}"] for name, value in known.items()]
  run.workdir.say(tables.aligned(["store", "of"], body, [False, True]))
  body = [
    [x.name, str(x.modules), f"{x.outputs} x {x.inputs}"] for x in store.layout
  ]
  header = ["block", "modules", "coordinates of each"]
  run.workdir.say(f"\n{tables.aligned(header, body, [False, True, True])}")
  reports.write(run.workdir, __doc__)
  print(f"\nask it with\n  python -m experiments.query --store={path}")


if __name__ == "__main__":
  app.run(main)
