"""The command line, as users type it."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers import refused

from empdg_jax import config as config_lib
from empdg_jax import main, metrics
from empdg_jax.config import Config
from empdg_jax.data.corpora import EMOTIONS
from empdg_jax.inference import predictions
from empdg_jax.inference.system import System, load_system
from empdg_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


@pytest.fixture(scope="module")
def workdir(
  sample_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """A run of a few steps."""
  path = tmp_path_factory.mktemp("runs") / "tiny"
  config = config_lib.from_json(config_lib.to_json(sample_config), "copy")
  config.train.mle_steps = config.train.mle_eval_every = 4
  config.eval.max_decode_steps = 5
  loop.train(config, path)
  return path


@pytest.fixture(scope="module")
def evaluated(workdir: pathlib.Path) -> pathlib.Path:
  """The folder of the run's evaluation on the test split."""
  assert main.main(["evaluate", f"--workdir={workdir}", "--split=test"]) == 0
  return workdir / "eval" / "test"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
  assert main.main([]) == 0
  usage = capsys.readouterr().out
  for name in (
    "prepare", "train", "evaluate", "metrics", "generate", "chat", "benchmark",
  ):  # fmt: skip
    assert name in usage
    with pytest.raises(SystemExit) as exit_:
      main.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"empdg {name}" in capsys.readouterr().out


def test_importing_is_light() -> None:
  program = (
    "import sys, time; start = time.perf_counter(); import empdg_jax.main; "
    "print(time.perf_counter() - start, 'jax' in sys.modules)"
  )
  seconds, has_jax = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  ).stdout.split()
  assert has_jax == "False"
  assert float(seconds) < 1.0


def test_only_parallel_names_pmap_and_only_main_has_flags() -> None:
  for path in (ROOT / "empdg_jax").rglob("*.py"):
    code = path.read_text()
    assert "pmap" not in code or path.name == "devices.py", path
    assert "absl" not in code or path.name == "main.py", path


def test_evaluation_files(evaluated: pathlib.Path) -> None:
  lines = predictions.read_predictions(evaluated / "predictions.jsonl")
  values = json.loads((evaluated / "metrics.json").read_text())
  assert len(lines) == values["examples"] == 128
  assert [line["id"] for line in lines[:2]] == ["test:0:1", "test:1:1"]
  assert set(lines[0]) == {
    "id", "emotion", "predicted_emotion", "context", "emotion_words",
    "reference", "response", "nll", "tokens", "likeliest_emotions",
  }  # fmt: skip
  for line in lines:
    assert len(line["likeliest_emotions"]) == 5
    assert line["likeliest_emotions"][0] == line["predicted_emotion"]
  for line in lines:
    assert line["tokens"] == len(line["reference"].split()) + 1
    assert len(line["response"].split()) <= 5
  assert values["model"] == "empdg_wo_d"
  assert values["split"] == "test"


def test_evaluation_scores_every_example_alone(
  evaluated: pathlib.Path, workdir: pathlib.Path
) -> None:
  """A batch of other examples changes neither score nor reply."""
  system = load_system(workdir)
  from empdg_jax.data import prepare

  dataset = prepare.load_dataset(system.config.data, system.vocabulary)
  encoded = dataset.encoded("test")
  lines = predictions.read_predictions(evaluated / "predictions.jsonl")
  for index in (0, 70, 127):
    ((_, nll, tokens),) = system.score([encoded[index]])
    ((_, reply),) = system.respond([encoded[index]], 16)
    assert tokens == lines[index]["tokens"]
    assert nll == pytest.approx(lines[index]["nll"], rel=1e-5)
    assert " ".join(reply.tokens) == lines[index]["response"]


def test_metrics_recomputes_what_evaluate_wrote(
  evaluated: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  path = evaluated / "predictions.jsonl"
  assert main.main(["metrics", f"--predictions={path}"]) == 0
  again = json.loads(capsys.readouterr().out)
  values = json.loads((evaluated / "metrics.json").read_text())
  assert again == {k: v for k, v in values.items() if k in again}
  assert again["perplexity"] > 1


def test_metrics_of_responses_alone(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  path = tmp_path / "p.jsonl"
  path.write_text('{"response": "a b a"}\n{"response": "c"}\n')
  command = ["metrics", f"--predictions={path}"]
  assert main.main(command) == 0
  values = json.loads(capsys.readouterr().out)
  assert values["distinct_1"] == 75.0
  assert values["vocab_size"] == 3
  assert "perplexity" not in values
  assert main.main([*command, "--vocab_size=10"]) == 0
  values = json.loads(capsys.readouterr().out)
  assert values["ead_1"] == pytest.approx(metrics.ead_n(["a b a", "c"], 1, 10))


def test_beam_search_through_the_configuration(
  workdir: pathlib.Path, evaluated: pathlib.Path
) -> None:
  config = config_lib.from_json((workdir / "config.json").read_text(), "run")
  greedy = predictions.read_predictions(evaluated / "predictions.jsonl")
  config.eval.beam_size = 3
  system = load_system(workdir, config)
  from empdg_jax.data import prepare

  encoded = prepare.load_dataset(config.data, system.vocabulary).encoded("test")
  replies = dict(system.respond(encoded[:16], 16))
  assert len(replies) == 16
  assert any(
    " ".join(replies[i].tokens) != greedy[i]["response"] for i in range(16)
  )


def test_generate_answers_good_lines_and_names_bad_ones(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  contexts = tmp_path / "contexts.jsonl"
  lines = [
    '{"context": ["My dog ran away last night."]}',
    "no json",
    '{"context": ["zxqv wvut"]}',
    '{"context": []}',
    json.dumps({"context": ["dog " * 10_000]}),
    '["I am afraid of the dark", "oh no", "it was so scary"]',
    json.dumps({"context": ["my dog ran away . " * 20]}),
    '{"context": 3}',
  ]
  contexts.write_text("\n".join(lines) + "\n")
  status = main.main(
    ["generate", f"--workdir={workdir}", f"--input={contexts}"]
  )
  out, err = capsys.readouterr()
  answers = [json.loads(line) for line in out.splitlines()]
  assert status == 2
  assert "5 of 8 lines" in err
  assert [("error" in answer) for answer in answers] == [
    False, True, True, True, True, False, False, True,
  ]  # fmt: skip
  assert answers[1]["error"].startswith("line 2: no JSON")
  assert "vocabulary" in answers[2]["error"]
  assert "empty" in answers[3]["error"]
  assert "10,000 tokens" in answers[4]["error"]
  assert answers[6]["context_tokens_cut"] == 100 - 47
  assert answers[0]["emotion"] in EMOTIONS


def test_chat_keeps_the_dialogue(
  workdir: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  import io

  from empdg_jax.inference import respond

  seen: list[list[str]] = []
  encode = respond.Responder.encode

  def spy(self: respond.Responder, utterances: list[str]) -> object:
    seen.append(list(utterances))
    return encode(self, utterances)

  monkeypatch.setattr(respond.Responder, "encode", spy)
  monkeypatch.setattr(
    sys,
    "stdin",
    io.StringIO("I am afraid.\nzxqv\nIt was dark.\n/new\nHi you\n"),
  )
  assert main.main(["chat", f"--workdir={workdir}"]) == 0
  out = capsys.readouterr().out
  assert [len(turns) for turns in seen] == [1, 3, 5, 1]
  assert seen[2][0] == "I am afraid."
  assert out.count("perceived:") >= 2


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["fly"], "unknown command 'fly'"),
    (["prepare"], "--config is missing"),
    (["prepare", "--config=nowhere.py"], "nowhere.py: no such file"),
    (["prepare", QUICKSTART, "--config.data.sorce=x"], "config.data.source"),
    (["prepare", QUICKSTART, "--config.train.seed=x"], "config.train.seed"),
    (["prepare", QUICKSTART, "--config.data.shapes=3"], "config.data.shapes"),
    (
      ["prepare", QUICKSTART, "--config.model.dropout_rate=1.5"],
      "dropout_rate",
    ),
    (["prepare", QUICKSTART, "--config.data.example_set=x"], "all_turns"),
    (["prepare", QUICKSTART, "--config.data.source=/nowhere"], "/nowhere"),
    (["prepare", QUICKSTART, "--config.data.lexicon=/nowhere"], "/nowhere"),
    (["train", QUICKSTART], "--workdir is missing"),
    (["train", QUICKSTART, "--workdir=x", "--steps=3"], "steps"),
    (["train", QUICKSTART, "--workdir=x", "stray"], "stray"),
    (["evaluate", "--workdir=/nowhere"], "is no run folder"),
    (["evaluate", "--split=dev"], "--split=dev"),
    (["evaluate", "--samples=1"], "--workdir is missing"),
    (["metrics"], "--predictions is missing"),
    (["metrics", "--predictions=/nowhere"], "/nowhere"),
    (["metrics", f"--predictions={__file__}"], "test_main.py:1: no JSON"),
    (["metrics", "--predictions=zero.jsonl"], "zero.jsonl:1: 'tokens'"),
  ],
)
def test_mistakes_get_one_clear_line(
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: pathlib.Path,
  argv: list[str],
  says: str,
) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "zero.jsonl").write_text('{"response": "a", "tokens": 0}')
  assert says in refused(capsys, *argv)
  assert not (tmp_path / "x").exists()


def test_model_name_that_does_not_exist(
  capsys: pytest.CaptureFixture[str], config: Config, tmp_path: pathlib.Path
) -> None:
  line = refused(
    capsys, "train", QUICKSTART, "--config.model.name=gpt",
    f"--config.data.data_dir={config.data.data_dir}",
    f"--workdir={tmp_path}/run",
  )  # fmt: skip
  assert "config.model.name='gpt'" in line
  assert not (tmp_path / "run").exists()


def test_evaluate_without_a_checkpoint(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  for name in ("config.json", "vocab.txt"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  assert "checkpoint" in refused(capsys, "evaluate", f"--workdir={tmp_path}")


def test_evaluation_that_cannot_be_written(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """It is refused before the work; a disk that fails after it is no mistake."""
  (tmp_path / "file").write_text("")
  with pytest.raises(config_lib.SaveError, match="cannot write"):
    predictions.write_evaluation(tmp_path / "file" / "test", [], {})
  monkeypatch.delattr(System, "score")
  out = f"--out={tmp_path / 'file' / 'test'}"
  said = refused(capsys, "evaluate", f"--workdir={workdir}", out)
  assert "file/test: cannot write" in said
