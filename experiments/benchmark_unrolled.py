"""What exact unrolling costs: time in training runs, memory in states.

  python -m experiments.benchmark_unrolled --config=configs/along.py:noisy

Replays one run of the config for 1 and for 100 measurements and prints the
seconds of each in multiples of the run itself, beside those of automatic
differentiation through the whole run. Then the bytes that a device needs, by
the compiled programs, against the number of steps and the levels of the tree;
in memory alone, and with the top level on disk. Compilation is not timed.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import launch
from tda import replay
from tda.evaluation import problem
from tda.replay import Walk
from tda.report import tables

PyTree = Any

QUERIES = flags.DEFINE_list("queries", ["1", "100"], "Measurements at once.")
STEPS = flags.DEFINE_list("steps", ["16", "64", "256", "1024"], "T of memory.")
LEVELS = flags.DEFINE_integer("levels", 2, "Levels of the tree that is timed.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs timed; the fastest counts.")


def main(_) -> None:
  task = problem.build(launch.setting())
  print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
  walk, orders = replay.walks(
    task.init, [*task.stages[:1]], task.weights()[:1], task.run_key(), None
  )[0]
  state = jax.jit(walk.enter)(task.init(jax.random.split(task.run_key())[0]))
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  print(f"{len(orders)} steps, a state of {size / 2**20:.2f} MiB\n")
  header = ["queries", "run s", "replay s", "in runs", "autodiff s", "in runs"]
  body = [_times(walk, state, orders, int(text)) for text in QUERIES.value]
  print(tables.aligned(header, body, [True] * len(header)))
  first, last = (float(row[2]) for row in (body[0], body[-1]))
  print(f"\n{body[-1][0]} queries / {body[0][0]}: {last / first:.2f}\n")
  header = ["steps", "autodiff", *(f"{x} levels" for x in (1, 2, 3))]
  header += [f"{x} on disk" for x in (2, 3)]
  body = [_memory(walk, state, orders, int(t)) for t in STEPS.value]
  print("Device memory of a replay of one query, in states")
  print(tables.aligned(header, body, [True] * len(header)))


def _times(
  walk: Walk, state: PyTree, orders: jax.Array, queries: int
) -> list[str]:
  """A row: seconds of the run, the replay and automatic differentiation."""
  parts = replay.tree(orders, LEVELS.value)
  forward = jax.jit(Walk.forward).lower(walk, state, parts[0]).compile()
  carry = _carry(walk, state, queries)
  lowered = jax.jit(Walk.backward).lower(walk, state, carry, parts[0])
  backward = lowered.compile()

  def replayed():
    states, carried = [state], carry
    for part in parts:
      states.append(forward(walk, states[-1], part))
    for part, begun in zip(parts[::-1], states[-2::-1], strict=True):
      carried = backward(walk, begun, carried, part)
    return carried

  whole = jax.jit(Walk.forward).lower(walk, state, orders).compile()
  plain = jax.jit(_autodiff).lower(walk, state, carry[0], orders).compile()
  run = _fastest(lambda: whole(walk, state, orders))
  replay_s = _fastest(replayed)
  plain_s = _fastest(lambda: plain(walk, state, carry[0], orders))
  seconds = [f"{run:.2f}", f"{replay_s:.2f}", f"{replay_s / run:.1f}"]
  return [str(queries), *seconds, f"{plain_s:.2f}", f"{plain_s / run:.1f}"]


def _memory(
  walk: Walk, state: PyTree, orders: jax.Array, steps: int
) -> list[str]:
  """A row: bytes of the compiled programs in states, of a run of T steps."""
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  orders = jnp.resize(orders, (steps, orders.shape[1]))
  carry = _carry(walk, state, 1)

  def bytes_of(function, *args) -> float:
    stats: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes

  plain = bytes_of(_autodiff, walk, state, carry[0], orders)
  cells = [plain]
  below = {}
  for levels in (1, 2, 3):
    parts = replay.tree(orders, levels)
    below[levels] = bytes_of(Walk.backward, walk, state, carry, parts[0])
    cells.append(below[levels] + len(parts) * size)
  cells += [below[2] + size, below[3] + size]
  return [str(steps), *(f"{x / size:.1f}" for x in cells)]


def _carry(walk: Walk, state: PyTree, queries: int) -> replay.Carry:
  """Random cotangents of the state that the run ends in."""
  key = jax.random.key(0)
  draw = lambda x: jax.random.normal(key, (queries, *x.shape), x.dtype)
  slopes = jnp.zeros((queries, *walk.weights.shape), walk.weights.dtype)
  return [draw(x) for x in replay.floats(state)], slopes


def _autodiff(walk, state, cotangents, orders):
  """The same by reverse mode through the scan over all steps."""

  def end(weights):
    changed = Walk(walk.parts, walk.optimizer, walk.data, weights, None)
    return replay.floats(changed.forward(state, orders))

  _, pull = jax.vjp(end, walk.weights)
  return jax.vmap(pull)(cotangents)[0]


def _fastest(function: Callable[[], Any]) -> float:
  def once():
    start = time.monotonic()
    jax.block_until_ready(function())
    return time.monotonic() - start

  return min(once() for _ in range(ROUNDS.value))


if __name__ == "__main__":
  app.run(main)
