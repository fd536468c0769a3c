"""Checkpoints of a run (Orbax), written in the background."""

import contextlib
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from empdg_jax import storage
from empdg_jax.config import InputError, SaveError
from empdg_jax.training.train_state import TrainState

LATEST, BEST = "latest", "best"
# The names of items in checkpoints of earlier versions, which stay readable.
_FORMER_NAMES = {
  "discriminators": "critics",
  "discriminator_optimizer": "critics_optimizer",
}


class Selected(NamedTuple):
  """The name of one of a run's checkpoints.

  Attributes:
    kind: `LATEST` or `BEST`.
    step: The number of updates before it in the whole run.
  """

  kind: str
  step: int


class Checkpoints:
  """The latest and best checkpoints of a run, written in the background.

  With several hosts, all of them save, wait and restore, in the same order.
  """

  def __init__(
    self, workdir: pathlib.Path, *, create: bool = False, keep: int = 1
  ) -> None:
    """Opens `workdir/checkpoints`.

    Args:
      workdir: The run folder.
      create: Whether to create a missing folder.
      keep: The number of latest checkpoints kept.
    """
    self._root = storage.absolute(workdir) / "checkpoints"
    self._managers = {
      kind: ocp.CheckpointManager(
        self._root / kind,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep if kind == LATEST else 1,
          create=create,
          # The managers write in the background, each with barriers of all
          # hosts. Without names of their own, a host at one manager's barrier
          # would meet a host at the other's.
          multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=kind
          ),
        ),
      )
      for kind in (LATEST, BEST)
      if create or (self._root / kind).is_dir()
    }

  def save(
    self,
    kind: str,
    step: int,
    generator: TrainState,
    discriminators: TrainState | None,
    progress: dict[str, Any],
  ) -> None:
    """Begins to write a checkpoint; the arrays may be changed afterwards.

    Args:
      kind: `LATEST` or `BEST`.
      step: The number of updates so far in the whole run.
      generator: The generator's state as NumPy arrays.
      discriminators: The discriminators' state, None if there are none.
      progress: A JSON value, the position of training and data.

    Raises:
      SaveError: This checkpoint or the one before could not be written.
    """
    trees = {"params": generator.params, "optimizer": _optimizer(generator)}
    if discriminators is not None:
      trees["discriminators"] = discriminators.params
      trees["discriminator_optimizer"] = _optimizer(discriminators)
    with self._writing():
      self._managers[kind].save(
        step,
        args=ocp.args.Composite(
          **{
            name: ocp.args.StandardSave(_arrays(tree))
            for name, tree in trees.items()
          },
          progress=ocp.args.JsonSave(progress),
        ),
      )

  def wait(self) -> None:
    """Waits until everything is written; see `save`."""
    with self._writing():
      for manager in self._managers.values():
        manager.wait_until_finished()

  def _writing(self) -> contextlib.AbstractContextManager[None]:
    """Converts any error into a `SaveError`, those of earlier saves as well."""
    # Orbax writes in a thread and raises its errors in the next call.
    return storage.errors(
      f"{self._root}: cannot write a checkpoint; the last whole one stays",
      SaveError,
    )

  def close(self) -> None:
    """Waits as `wait` does, then frees the managers' resources."""
    with self._writing():
      for manager in self._managers.values():
        manager.close()

  def step(self, kind: str) -> int | None:
    """Returns the step of the newest checkpoint of a kind, None without one."""
    manager = self._managers.get(kind)
    return None if manager is None else manager.latest_step()

  def all(self) -> list[Selected]:
    """Returns all checkpoints: the latest ones, newest first, then the best."""
    return [
      Selected(kind, step)
      for kind, manager in self._managers.items()
      for step in sorted(manager.all_steps(), reverse=True)
    ]

  def select(self, which: str | None) -> Selected:
    """Finds a checkpoint by the user's name for it.

    Args:
      which: `"best"`, `"latest"` or a step; None for the best, or the latest
        before the first validation.

    Raises:
      InputError: There is no such checkpoint.
    """
    found = self.all()
    if which is None:
      which = BEST if any(c.kind == BEST for c in found) else LATEST
    for checkpoint in found:
      if which in (checkpoint.kind, str(checkpoint.step)):
        return checkpoint
    if which in (LATEST, BEST):
      raise InputError(
        f"{self._root} holds no {which} checkpoint; 'empdg train' writes one"
      )
    steps = sorted({str(c.step) for c in found}, key=int)
    raise InputError(
      f"--checkpoint={which}: expected best, latest or a step that is kept: "
      + (", ".join(steps) or "there is none yet")
    )

  def folder(self, checkpoint: Selected) -> pathlib.Path:
    """Returns a checkpoint's folder."""
    return self._root / checkpoint.kind / str(checkpoint.step)

  def restore_params(
    self, kind: str, like: Any, step: int | None = None
  ) -> Any:
    """Reads the generator's parameters.

    Args:
      kind: `LATEST` or `BEST`.
      like: Parameters of the expected shapes.
      step: The step of a checkpoint of that kind; None for the newest.

    Returns:
      The parameters as NumPy arrays.

    Raises:
      InputError: There is no such checkpoint, it is damaged, or its shapes
        differ.
      SaveError: The disk or the bucket fails.
    """
    return self._read(kind, "params", like, step)

  def restore_generator(self, kind: str, like: TrainState) -> TrainState:
    """Reads the generator and its optimiser's state; see `restore_params`."""
    return self._restore_state(kind, like, "params", "optimizer")

  def restore_discriminators(self, kind: str, like: TrainState) -> TrainState:
    """Reads the discriminators likewise; see `restore_params`."""
    return self._restore_state(
      kind, like, "discriminators", "discriminator_optimizer"
    )

  def _restore_state(
    self, kind: str, like: TrainState, params: str, optimizer: str
  ) -> TrainState:
    return TrainState(
      params=self._read(kind, params, like.params),
      **self._read(kind, optimizer, _optimizer(like)),
    )

  def restore_progress(
    self, kind: str, step: int | None = None
  ) -> dict[str, Any]:
    """Reads the progress that `save` was given; see `restore_params`."""
    return self._read(kind, "progress", None, step)

  def _read(
    self, kind: str, item: str, like: Any, step: int | None = None
  ) -> Any:
    """Reads an item of the shapes of `like`, or JSON for None.

    See `restore_params`.
    """
    step = self.select(kind).step if step is None else step
    where = self.folder(Selected(kind, step))
    restore = (
      ocp.args.JsonRestore()
      if like is None
      else ocp.args.StandardRestore(_arrays(like))
    )
    with storage.errors(f"{where}: cannot read", SaveError):
      former = _FORMER_NAMES.get(item)
      if former and (where / former).exists():
        item = former
      try:
        found = self._managers[kind].restore(
          step, args=ocp.args.Composite(**{item: restore})
        )[item]
      # Orbax raises these for missing and damaged files and for other trees; a
      # disk or a bucket that fails raises other errors.
      except (ValueError, KeyError, FileNotFoundError) as error:
        raise InputError(
          f"{where}: damaged, or not of this configuration "
          f"({storage.first_line(error)})"
        ) from error
    if like is None:
      return found
    # Orbax restores the shapes that it finds, whatever it is asked for.
    for (path, leaf), array in zip(
      jax.tree_util.tree_leaves_with_path(like),
      jax.tree.leaves(found),
      strict=True,
    ):
      if np.shape(leaf) != np.shape(array):
        raise InputError(
          f"{where}: {jax.tree_util.keystr(path)} has shape {np.shape(array)};"
          f" this configuration needs {np.shape(leaf)}"
        )
    return found


def _optimizer(state: TrainState) -> dict[str, Any]:
  """Returns a state without its parameters."""
  return {"step": state.step, "opt_state": state.opt_state}


def _arrays(tree: Any) -> Any:
  """Returns NumPy arrays, uninitialised ones where only a shape is given."""
  return jax.tree.map(
    lambda x: (
      np.empty(x.shape, x.dtype)
      if isinstance(x, jax.ShapeDtypeStruct)
      else np.asarray(x)
    ),
    tree,
  )
