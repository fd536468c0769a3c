"""Fixtures of all tests: the embedded corpus and the real data, if there."""

import copy
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import fake_bucket
import jax
import pytest

from empdg_jax.config import TEXT_RULES, Config, DataConfig
from empdg_jax.data.prepare import Dataset, load_dataset

# Before any test module makes an array: for the CPU, whatever there is.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"
if jax.version.__version_info__ < (0, 11):
  # Kernels take half the time to compile. Later versions of XLA, in which the
  # flag is unknown, refuse it.
  _FLAG = "--xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()


@pytest.fixture(scope="session", autouse=True)
def _fast_compilation(tmp_path_factory: pytest.TempPathFactory) -> None:
  """Compiles with few optimisations, and the same step only once.

  The environment tells the processes that tests start.
  """
  folder = str(tmp_path_factory.mktemp("compiled"))
  for name, value in (
    ("jax_disable_most_optimizations", True),
    ("jax_compilation_cache_dir", folder),
    ("jax_persistent_cache_min_compile_time_secs", 0),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def real_data() -> Path:
  """The folder with the real dataset, which is not part of the repository."""
  path = Path(__file__).resolve().parents[2] / "shared" / "data"
  if not path.exists():
    pytest.skip("needs ../shared/data, the real dataset")
  return path


@pytest.fixture(scope="session")
def real_data_config(
  real_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> DataConfig:
  """The real dataset with the paper's lexicon; copy before changing it."""
  # Of all workers: their own folders lie in one of the whole run.
  of_run = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    of_run = of_run.parent
  return DataConfig(
    source=str(real_data / "empatheticdialogues.tar.gz"),
    data_dir=str(of_run / "real"),
    lexicon=str(real_data / "nrc_words.txt"),
  )


@pytest.fixture(scope="session")
def real_dataset(real_data_config: DataConfig) -> Dataset:
  """The real dataset, prepared; this takes about a minute."""
  folder = Path(real_data_config.data_dir)
  folder.mkdir(exist_ok=True)
  with (folder / "lock").open("w") as lock:
    # The first worker prepares it, and the others read it.
    fcntl.flock(lock, fcntl.LOCK_EX)
    return load_dataset(real_data_config)


@pytest.fixture(scope="session")
def sample_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
  """A small model on the embedded corpus; `config` is a copy to change."""
  config = Config()
  config.data.source = "sample"
  config.data.data_dir = str(tmp_path_factory.mktemp("sample"))
  config.data.shapes = ((24, 14, 16), (48, 24, 24))
  config.model.emb_dim = 16
  config.model.key_value_depth = 8
  config.model.filter_size = 12
  # As a run folder holds it.
  config.data.text_rules = TEXT_RULES
  # Named, so that the tests compute the same on every machine.
  config.train.compute_dtype = "float32"
  config.train.batch_size = 8
  config.train.warmup_steps = 50
  config.eval.batch_size = 16
  return config


@pytest.fixture
def config(sample_config: Config) -> Config:
  """A copy of `sample_config` that a test may change."""
  return copy.deepcopy(sample_config)


@pytest.fixture(scope="session")
def sample_dataset(sample_config: Config) -> Dataset:
  """The embedded corpus, prepared."""
  return load_dataset(sample_config.data)


@pytest.fixture(scope="module")
def storage() -> Generator[fake_bucket.FakeStorage]:
  """A stand-in for Cloud Storage, with the bucket `gs://pod`."""
  with (
    fake_bucket.serve("pod") as server,
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in server.environment.items():
      patch.setenv(name, value)
    yield server


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Generator[None]:
  """Frees what a module compiled.

  Every compiled program holds mappings of memory, of which Linux allows a
  process 65,530; a worker that compiles thousands of programs would crash.
  """
  yield
  jax.clear_caches()
