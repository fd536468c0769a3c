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
# Names that items had in checkpoints of earlier versions.
_FORMER_NAMES = {
  "discriminators": "critics",
  "discriminator_optimizer": "critics_optimizer",
}


class Selected(NamedTuple):
  """One of a run's checkpoints.

  Attributes:
    kind: `LATEST` or `BEST`.
    step: The run's updates before it.
  """

  kind: str
  step: int


class Checkpoints:
  """The latest and the best checkpoints of a run, written in the background."""

  def __init__(
    self, workdir: pathlib.Path, *, create: bool = False, keep: int = 1
  ) -> None:
    """Opens `workdir/checkpoints`.

    Args:
      workdir: The run folder.
      create: Whether to make the folder if it is missing.
      keep: How many of the latest checkpoints stay when one is written.
    """
    self._root = storage.absolute(workdir) / "checkpoints"
    self._managers = {
      kind: ocp.CheckpointManager(
        self._root / kind,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep if kind == LATEST else 1,
          create=create,
          # Else the hosts would take one manager's barrier for the other's.
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
      step: The run's updates so far.
      generator: NumPy arrays, as `devices.unreplicate` gives them.
      discriminators: The same of the discriminators, if the system has any.
      progress: A JSON value: where data and training stand.

    Raises:
      SaveError: This one or the one before could not be written.
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
    """Waits until everything is written."""
    with self._writing():
      for manager in self._managers.values():
        manager.wait_until_finished()

  def _writing(self) -> contextlib.AbstractContextManager[None]:
    """Makes one clear error of what goes wrong, in the background as well."""
    return storage.errors(
      f"{self._root}: cannot write a checkpoint; the last whole one stays",
      SaveError,
    )

  def close(self) -> None:
    """Waits, then frees what the managers hold; see `save`."""
    with self._writing():
      for manager in self._managers.values():
        manager.close()

  def step(self, kind: str) -> int | None:
    """Returns the step of a checkpoint, None if there is none."""
    manager = self._managers.get(kind)
    return None if manager is None else manager.latest_step()

  def all(self) -> list[Selected]:
    """Returns every checkpoint, the latest ones first."""
    return [
      Selected(kind, step)
      for kind, manager in self._managers.items()
      for step in sorted(manager.all_steps(), reverse=True)
    ]

  def select(self, which: str | None) -> Selected:
    """Finds a checkpoint by what a user calls it.

    Args:
      which: `"best"`, `"latest"` or a step; None takes the best, or the latest
        if there has been no validation yet.

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
    """Returns where a checkpoint is."""
    return self._root / checkpoint.kind / str(checkpoint.step)

  def restore_params(
    self, kind: str, like: Any, step: int | None = None
  ) -> Any:
    """Reads parameters.

    Args:
      kind: `LATEST` or `BEST`.
      like: Parameters of the expected shapes.
      step: Which of that kind; None takes the latest.

    Returns:
      NumPy arrays.

    Raises:
      InputError: There is no such checkpoint, or its shapes differ.
    """
    return self._restore(kind, "params", like, step)

  def restore_generator(self, kind: str, like: TrainState) -> TrainState:
    """Reads the generator that `save` was given; see `restore_params`."""
    params = self.restore_params(kind, like.params)
    return TrainState(
      params=params, **self._restore(kind, "optimizer", _optimizer(like))
    )

  def restore_discriminators(
    self, kind: str, like: TrainState | None
  ) -> TrainState | None:
    """Reads the discriminators that `save` was given; see `restore_params`."""
    if like is None:
      return None
    params = self._restore(kind, "discriminators", like.params)
    return TrainState(
      params=params,
      **self._restore(kind, "discriminator_optimizer", _optimizer(like)),
    )

  def restore_progress(
    self, kind: str, step: int | None = None
  ) -> dict[str, Any]:
    """Reads the progress that `save` was given; see `restore_params`."""
    step = self.select(kind).step if step is None else step
    return self._read(kind, step, "progress", ocp.args.JsonRestore())

  def _restore(
    self, kind: str, item: str, like: Any, step: int | None = None
  ) -> Any:
    step = self.select(kind).step if step is None else step
    where = f"{self.folder(Selected(kind, step))}"
    restore = ocp.args.StandardRestore(_arrays(like))
    tree = self._read(kind, step, item, restore)
    expected = jax.tree_util.tree_leaves_with_path(like)
    for (path, leaf), found in zip(
      expected, jax.tree.leaves(tree), strict=True
    ):
      if np.shape(leaf) != np.shape(found):
        raise InputError(
          f"{where}: {jax.tree_util.keystr(path)} has shape {np.shape(found)};"
          f" this configuration needs {np.shape(leaf)}"
        )
    return tree

  def _read(
    self, kind: str, step: int, item: str, restore: ocp.args.CheckpointArgs
  ) -> Any:
    """Reads one item of a checkpoint.

    Raises:
      InputError: It is damaged, or not what is asked for.
      SaveError: The disk or the bucket fails.
    """
    where = self.folder(Selected(kind, step))
    former = _FORMER_NAMES.get(item)
    if former and (where / former).exists():
      item = former
    with storage.errors(f"{where}: cannot read", SaveError):
      try:
        return self._managers[kind].restore(
          step, args=ocp.args.Composite(**{item: restore})
        )[item]
      except (ValueError, KeyError, FileNotFoundError) as error:
        raise InputError(
          f"{where}: damaged, or not of this configuration "
          f"({storage.first_line(error)})"
        ) from error


def _optimizer(state: TrainState) -> dict[str, Any]:
  """Returns all of a state but its parameters."""
  return {"step": state.step, "opt_state": state.opt_state}


def _arrays(tree: Any) -> Any:
  """Returns NumPy arrays; blank ones where only a shape is given."""
  return jax.tree.map(
    lambda x: (
      np.empty(x.shape, x.dtype)
      if isinstance(x, jax.ShapeDtypeStruct)
      else np.asarray(x)
    ),
    tree,
  )


def restore_generator(workdir: pathlib.Path, like: TrainState) -> TrainState:
  """Reads the best generator of another run, with its optimiser's state.

  Args:
    workdir: The other run's folder.
    like: A state of the expected shapes.

  Returns:
    NumPy arrays.

  Raises:
    InputError: It has no best checkpoint, or one of other shapes.
  """
  checkpoints = Checkpoints(workdir)
  try:
    return checkpoints.restore_generator(BEST, like)
  finally:
    checkpoints.close()
