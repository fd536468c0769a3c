"""Run folders and exports of earlier versions still load.

`fixtures/make.sh` made the fixture at commit 2fd2889, from the embedded corpus.
"""

import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from helpers import refused

from empdg_jax import config as config_lib
from empdg_jax import export, main
from empdg_jax.config import TEXT_RULES, Config, InputError
from empdg_jax.data.corpora import EMOTIONS
from empdg_jax.training import run_folder
from empdg_jax.training.checkpoint import LATEST, Checkpoints

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "before_layout.tar.xz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder with `run`, `export` and the lexicon that the run names."""
  folder = tmp_path_factory.mktemp("before")
  with tarfile.open(FIXTURE) as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.fixture(autouse=True)
def _inside(
  unpacked: pathlib.Path, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
  """Works where the run's relative lexicon path leads to its lexicon."""
  monkeypatch.chdir(unpacked)


def test_the_fixture_is_small() -> None:
  assert FIXTURE.stat().st_size < 300_000


def test_a_run_without_labels_has_the_32() -> None:
  assert (
    "emotions"
    not in json.loads(pathlib.Path("run/config.json").read_text())["data"]
  )
  run = run_folder.open_run(pathlib.Path("run"))
  assert run.emotions == EMOTIONS
  assert run.config.data.text_rules == 1
  assert len(run.vocabulary) == 1506


@pytest.mark.parametrize("flag", ["--workdir=run", "--bundle=export"])
def test_evaluates_as_before(
  flag: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  before = json.loads(pathlib.Path("run/eval/valid/metrics.json").read_text())
  argv = ["evaluate", flag, "--split=valid", f"--out={tmp_path}"]
  assert main.main(argv) == 0
  noted = capsys.readouterr().err
  assert ("has no checksums" in noted) == (flag == "--workdir=run")
  values = json.loads((tmp_path / "metrics.json").read_text())
  assert [name for name in values if name in before] == list(before)
  exact = ("model", "split", "step", "parameters", "examples", "vocab_size")
  for name in exact:
    assert values[name] == before[name]
  for name in ("perplexity", "perplexity_per_example", "emotion_accuracy"):
    assert values[name] == pytest.approx(before[name], rel=1e-5)


def test_resumes_with_the_former_names_of_checkpoint_items(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = tmp_path / "run"
  shutil.copytree("run", workdir)
  items = workdir / "checkpoints" / "latest" / "12"
  assert {"critics", "critics_optimizer"} <= {p.name for p in items.iterdir()}
  checkpoints = Checkpoints(workdir)
  progress = checkpoints.restore_progress(LATEST)
  checkpoints.close()
  assert (progress["phase"], progress["updates"]) == ("adversarial", 12)
  assert main.main(["train", f"--workdir={workdir}"]) == 0
  said = capsys.readouterr().out
  assert "Resuming" in said
  assert run_folder.read_config(workdir).data.text_rules == 1
  assert "latest/12 has no checksums" in said


def test_a_run_keeps_its_rules_of_text(
  tmp_path: pathlib.Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
  """A run without a version has the first; a new one has the newest."""
  old = pathlib.Path("run")
  config.data.text_rules = 0
  assert run_folder.with_text_rules(config, old).data.text_rules == 1
  config = run_folder.with_text_rules(config, tmp_path / "new")
  assert config.data.text_rules == TEXT_RULES == 2
  argv = ["evaluate", "--workdir=run", "--config.data.text_rules=2"]
  assert "the run has 1" in refused(capsys, *argv)
  argv = ["train", "--workdir=run", "--config.data.text_rules=2"]
  assert "with config.data.text_rules=1, not 2" in refused(capsys, *argv)
  taken = run_folder.Run(
    tmp_path, config, run_folder.open_run(old).vocabulary, EMOTIONS
  )
  with pytest.raises(InputError, match=r"by version 1 of the rules.*version 2"):
    run_folder.check_same_generator(taken, old)
  values = json.loads((old / "config.json").read_text())
  values["data"]["text_rules"] = 3
  with pytest.raises(InputError, match="at most 2; a newer one needs"):
    config_lib.from_json(json.dumps(values), "config.json")


def test_an_export_responds() -> None:
  response = export.load("export").respond(["i lost my job today"])
  assert response.emotion in EMOTIONS
  responder = export.load("export")
  assert responder.encode(["i haven't. ok"]).words == ("i", "haven't.", "ok")
  assert response.emotions is not None
  assert np.sum(response.emotions) == pytest.approx(1.0, abs=1e-5)
