"""The start of a run: a new one, or one resumed from its latest checkpoint."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline, prepare, vectors
from empdg_jax.data.pipeline import Batch, Shape
from empdg_jax.models import registry
from empdg_jax.parallel import devices, hosts
from empdg_jax.training import checkpoint, precision, record, run_folder
from empdg_jax.training.calls import Call, CallReader
from empdg_jax.training.learner import Learner
from empdg_jax.training.phases import DISCRIMINATOR, MLE
from empdg_jax.training.profiling import InputWait
from empdg_jax.training.run_lock import RunLock
from empdg_jax.training.train_log import TrainLog
from empdg_jax.training.watchdog import Watchdog


@dataclasses.dataclass
class Progress:
  """The position of a run, saved as JSON with every checkpoint.

  Attributes:
    phase: The current phase's name in `metrics.jsonl`.
    done: The rounds of this phase that are done.
    updates: The number of updates of all players in the whole run, which is
      the step of its logs and checkpoints.
    best: The best validation so far in this phase.
    worse: Validations in a row without a better one.
    data: The state of the iterator over training batches.
  """

  phase: str = MLE
  done: int = 0
  updates: int = 0
  best: float | None = None
  worse: int = 0
  data: Any = None


class TrainBatches:
  """This host's training batches, with a position that can be saved.

  Attributes:
    wait: The time for which the devices waited for batches.
    shapes: The padded lengths of this phase's batches, as an epoch first has
      them.
  """

  def __init__(self, config: Config, dataset: prepare.Dataset) -> None:
    """Encodes the split; `open` comes before the first batch."""
    self._config = config
    self._encoded, self._shapes = dataset.encoded("train"), dataset.shapes
    if self._config.train.feedback == "shuffled":
      self._encoded = pipeline.shuffle_feedback(
        self._encoded, self._config.train.seed
      )
    self._batches: Any = None
    self._reader: Any = None
    self._position: Any = None
    self.shapes: list[Shape] = []
    self.wait = InputWait()

  def open(self, phase: str, state: Any) -> None:
    """Opens a phase's batches at a position, or at the first for None."""
    train, run = self._config.train, self._config.data.batches_per_run
    # Phases 2 and 3 pad to fewer shapes: every shape is one more compilation,
    # their steps take long to compile, and most of their time does not depend
    # on the padding.
    first = phase == MLE
    shapes = self._shapes if first else pipeline.coarse_shapes(self._shapes)
    run = run if first else 1
    self._batches = pipeline.train_batches(
      self._encoded,
      shapes,
      batch_size=train.batch_size,
      seed=train.seed,
      rows=hosts.rows(train.batch_size),
      batches_per_run=run,
    )
    plan = pipeline.BatchPlan(self._encoded, shapes, train.batch_size)
    epoch = plan.shuffled_epoch(train.seed, 0, run)
    self.shapes = list(dict.fromkeys(shape for shape, _ in epoch))
    if state is not None:
      self._batches.set_state(state)
    self._position = self._batches.get_state()

  @contextlib.contextmanager
  def reading(
    self, steps: int, until_due: Callable[[int], int]
  ) -> Generator[None]:
    """Reads calls ahead while the block runs; see `CallReader`."""
    reader = CallReader(self._batches, steps, until_due)
    with contextlib.closing(reader):
      self._reader = reader
      yield

  def next(self, running: jax.Array | None) -> Call:
    """Returns the next call; see `InputWait.next`."""
    call = self.wait.next(self._reader, running)
    self._position = call.position
    return call

  def state(self) -> Any:
    """Returns the position after the latest call, a JSON value."""
    return self._position


@dataclasses.dataclass(frozen=True)
class Session:
  """Everything that one process needs to train, at the run's position."""

  lock: RunLock
  log: TrainLog
  learner: Learner
  checkpoints: checkpoint.Checkpoints
  progress: Progress
  batches: TrainBatches
  valid_batches: list[Batch]
  watchdog: Watchdog
  recorder: record.Recorder

  def save(self, kind: str) -> None:
    """Begins to write a checkpoint of this position; see `Checkpoints.save`."""
    self.lock.check()
    # A bucket holds only what was copied to it: without this copy, a run that
    # resumes here would find no metrics of the updates before.
    self.log.save()
    self.save_record()
    self.progress.data = self.batches.state()
    self.checkpoints.save(
      kind,
      self.progress.updates,
      self.learner.states(best=kind == checkpoint.BEST),
      dataclasses.asdict(self.progress),
    )

  def save_record(self, finished: bool = False) -> None:
    """Writes the run's record."""
    written = self.recorder.to_json(self.progress.updates, finished)
    self.log.keep(record.RECORD, written)

  def close(self) -> None:
    """Waits for background writes, then closes logs and checkpoints."""
    self.log.close()
    self.checkpoints.close()


def open_session(
  config: Config, workdir: pathlib.Path, lock: RunLock, watchdog: Watchdog
) -> Session:
  """Starts a run, or resumes it where its latest checkpoint stands.

  Args:
    config: The run's configuration.
    workdir: The run folder.
    lock: The folder's lock, which is taken here and held while training.
    watchdog: The clock of this process, which starts here.

  Raises:
    InputError: The configuration, the data or the folder cannot be used, or
      another training uses it; nothing has been written.
    SaveError: The latest checkpoint could not be read.
  """
  # In this order:
  # 1. whatever a host can refuse without the others: once hosts wait for each
  # other, one that gives up alone would leave them waiting;
  with hosts.refusing_together():
    config = _with_dtype(config, workdir)
    log = TrainLog(config.train, workdir)
    config = run_folder.with_text_rules(config, workdir)
    dataset = _load_dataset(config, workdir)
    embeddings = _load_vectors(config, dataset, log)
    run = run_folder.Run(
      workdir, config, dataset.vocabulary, dataset.corpus.emotions
    )
    other_run = _other_run(run)
    recorder = record.Recorder(workdir, config.train.compute_dtype)
  hosts.check_same(lambda: config_lib.to_json(config), "configurations")
  hosts.check_same(dataset.digest, "data")
  hosts.check_shared(workdir, "workdir")
  # 2. the states of a new run, whose shapes a checkpoint must have, and over
  # them the generator of another run, if one is given;
  learner = Learner(config, dataset, embeddings)
  log.say(
    f"{config.model.name}: {learner.parameters:,} parameters, in "
    f"{config.train.compute_dtype} on {devices.describe_devices()}"
  )
  progress = Progress()
  if other_run:
    learner.take_over(other_run)
    progress.phase = DISCRIMINATOR
  # 3. the run folder, not before the states: an error above leaves no folder;
  # locked, so that no other training reads and writes the same checkpoints;
  lock.acquire(log.say)
  with hosts.refusing_together():
    if hosts.is_main_process():
      run_folder.write_run(run)
  # 4. its latest checkpoint, if any, over the states and the position;
  watchdog.feed("the start", patient=True)
  checkpoints = checkpoint.Checkpoints(
    workdir,
    create=True,
    keep=config.train.keep_checkpoints,
    warn=log.say,
    expecting=watchdog.expecting,
  )
  if checkpoints.step(checkpoint.LATEST) is not None:
    progress = Progress(**learner.restore(checkpoints))
    log.say(f"Resuming {workdir} at step {progress.updates:,}")
  # 5. the batches, which begin at the checkpoint's position;
  batches = TrainBatches(config, dataset)
  batches.open(progress.phase, progress.data)
  # 6. the logs, which drop the lines after the checkpoint: those updates are
  # computed and logged again;
  log.open(progress.updates, progress.phase)
  valid_batches = list(
    pipeline.eval_batches(
      dataset.encoded("valid"),
      pipeline.coarse_shapes(dataset.shapes),
      batch_size=config.eval.batch_size,
      rows=hosts.rows(config.eval.batch_size),
    )
  )
  # 7. the devices, once the states on the host are final.
  learner.start()
  return Session(
    lock,
    log,
    learner,
    checkpoints,
    progress,
    batches,
    valid_batches,
    watchdog,
    recorder,
  )


def _with_dtype(config: Config, workdir: pathlib.Path) -> Config:
  """Returns the configuration with the compute type of this run decided."""
  if config.train.compute_dtype != "auto":
    return config
  if (workdir / "config.json").exists():
    # The type of the run, whatever would be faster on this machine.
    chosen = run_folder.read_config(workdir).train.compute_dtype
  else:
    fast = precision.resolve(config.train) == "bfloat16"
    fast = hosts.decided_by_main(fast)
    chosen = "bfloat16" if fast else "float32"
  train = dataclasses.replace(config.train, compute_dtype=chosen)
  return dataclasses.replace(config, train=train)


def check_without_data(config: Config, num_devices: int) -> None:
  """Checks the fields that need neither the data nor a run folder.

  Args:
    config: The run's configuration.
    num_devices: The number of devices on all hosts.

  Raises:
    InputError: Naming a field that training refuses.
  """
  devices.check_batches(config, num_devices)
  if (
    config.train.mle_checkpoint
    and not registry.find_system(config.model).discriminators
  ):
    raise InputError(
      f"config.train.mle_checkpoint: {config.model.name} has no phase after "
      "maximum likelihood to begin with; use a system with discriminators, "
      "or ''"
    )


def _load_dataset(config: Config, workdir: pathlib.Path) -> prepare.Dataset:
  """Checks the fields that need no data, and only then loads the data."""
  check_without_data(config, jax.device_count())
  run_folder.check_same_config(workdir, config)
  return prepare.load_dataset(config.data)


def _load_vectors(
  config: Config, dataset: prepare.Dataset, log: TrainLog
) -> np.ndarray | None:
  """Returns the pretrained word embeddings, `[V, d]`, None to draw them."""
  # Another run's generator brings its own embeddings.
  if not config.data.vectors or config.train.mle_checkpoint:
    return None
  embeddings, coverage = vectors.load_vectors(
    config.data.vectors,
    dataset.vocabulary,
    config.model.emb_dim,
    np.random.default_rng(config.train.seed),
  )
  log.say(f"Word vectors for {coverage:.1%} of the vocabulary")
  return embeddings


def _other_run(run: run_folder.Run) -> pathlib.Path | None:
  """Returns the checked run whose generator this one takes, if any."""
  given = run.config.train.mle_checkpoint
  if not given:
    return None
  path = storage.run_path(given, "config.train.mle_checkpoint")
  run_folder.check_same_generator(run, path)
  return path
