"""Every form in which a command line may be written."""

import contextlib
import inspect
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from helpers import refused

from empdg_jax import __version__, commands, main
from empdg_jax import config as config_lib
from empdg_jax.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
FILE = f"--config={CONFIGS}/quickstart.py"


@pytest.fixture(autouse=True)
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A folder to work in, with the configuration of a run."""
  monkeypatch.chdir(tmp_path)
  config = Config()
  config.train.seed = 42
  config.eval.beam_size = 7
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
  """Returns what the command gets."""
  got: list[Any] = []

  def command(values: Any) -> int:
    got.append(values)
    return 0

  monkeypatch.setattr(commands, argv[0].replace("-", "_"), command)
  assert main.main(argv) == 0
  return got[0]


@pytest.mark.parametrize(
  ("argv", "name", "value"),
  [
    ([FILE], "data.source", "sample"),
    (["--config", f"{CONFIGS}/quickstart.py"], "data.source", "sample"),
    ([f"--config={CONFIGS}/pod.py"], "train.batch_size", 256),
    ([f"--config={CONFIGS}/pod.py:16"], "train.batch_size", 512),
    ([f"--config={CONFIGS}/pod.py:7"], "train.batch_size", 224),
    (["--config", f"{CONFIGS}/pod.py:16"], "train.batch_size", 512),
    (["--config=quickstart"], "data.source", "sample"),
    (["--config=pod:16"], "train.batch_size", 512),
    (["--config", "pod"], "train.batch_size", 256),
    ([FILE, "--config.train.seed=1"], "train.seed", 1),
    ([FILE, "--config.train.seed", "1"], "train.seed", 1),
    (["--config.train.seed=1", FILE], "train.seed", 1),
    (["--config.train.seed", "1", FILE], "train.seed", 1),
    ([FILE, "--config.train.seed=1", "--config.train.seed=2"], "train.seed", 2),
    ([FILE, "--config.train.mle_steps=3"], "train.mle_steps", 3),
    ([FILE, "--config.train.mle-steps=3"], "train.mle_steps", 3),
    ([FILE, "--config.train.mle-steps", "3"], "train.mle_steps", 3),
    ([FILE, "--config.train.mle_steps=1_000"], "train.mle_steps", 1_000),
    ([FILE, "--config.train.adam_eps=1e-4"], "train.adam_eps", 1e-4),
    ([FILE, "--config.train.adam_eps=1"], "train.adam_eps", 1.0),
    ([FILE, "--config.model.norm_order=post"], "model.norm_order", "post"),
    ([FILE, "--config.model.norm_order", "post"], "model.norm_order", "post"),
    ([FILE, "--config.data.vectors="], "data.vectors", ""),
    ([FILE, "--config.data.vectors=a=b"], "data.vectors", "a=b"),
    ([FILE, "--config.data.vectors", "-x"], "data.vectors", "-x"),
    ([FILE, "--config.data.vectors=--x y"], "data.vectors", "--x y"),
    ([FILE, "--config.data.vectors=1"], "data.vectors", "1"),
    ([FILE, "--config.model.kernel_widths=(1,2)"], "model.kernel_widths",
     (1, 2)),
    ([FILE, "--config.model.kernel_widths", "1, 2"], "model.kernel_widths",
     (1, 2)),
    ([FILE, "--config.model.kernel_widths=[1]"], "model.kernel_widths", (1,)),
    ([FILE, "--config.model.kernel_widths=3"], "model.kernel_widths", (3,)),
    (
      [FILE, "--config.data.shapes=((24,14,14),(160,48,100))"],
      "data.shapes",
      ((24, 14, 14), (160, 48, 100)),
    ),
    ([FILE, "--config.data.shapes=((12,8,8),)"], "data.shapes", ((12, 8, 8),)),
    *(
      ([FILE, *flag], "model.tie_embeddings", value)
      for name in ["--config.model.tie_embeddings"]
      for flag, value in [
        ([name], True),
        ([f"{name}=true"], True),
        ([f"{name}=True"], True),
        ([f"{name}=false"], False),
        ([f"{name}=False"], False),
        ([name, "true"], True),
        ([name, "False"], False),
        ([name, "--config.train.seed=1"], True),
        (["--config.model.tie-embeddings"], True),
      ]
    ),
    ([FILE, "--config.model.pointer_generator=false"],
     "model.pointer_generator", False),
    (["--workdir=run"], "train.seed", 42),
    (["--workdir", "run"], "train.seed", 42),
    (["--workdir=run", "--config.train.seed=1"], "train.seed", 1),
    (["--config.train.mle_steps=3", "--workdir=run"], "train.seed", 42),
    (["--workdir=run", FILE], "train.seed", 0),
    (["--config=", "--workdir=run"], "train.seed", 42),
  ],
)  # fmt: skip
def test_configurations(
  monkeypatch: pytest.MonkeyPatch, argv: list[str], name: str, value: object
) -> None:
  config = parsed(monkeypatch, "train", *argv).config
  config_lib.validate(config)
  got = config_lib.flatten(config)[name]
  assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
  ("argv", "expected"),
  [
    ("train --workdir=x", {"workdir": "x", "config": None}),
    ("train --workdir=x --config.train.seed=1", {"config": None}),
    (
      "train --coordinator-address=h:1 --num_processes 2 --process-id=0",
      {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
    ),
    ("train", {"coordinator_address": "", "num_processes": None}),
    ("train --workdir=a --workdir=b", {"workdir": "b"}),
    ("evaluate --workdir=run", {"split": "test", "samples": 6}),
    ("evaluate --split valid --samples 0", {"split": "valid", "samples": 0}),
    ("evaluate --out=", {"out": "", "checkpoint": None, "bundle": ""}),
    ("generate --input -", {"input": "-"}),
    ("generate --checkpoint=60", {"checkpoint": "60", "input": "-"}),
    ("metrics --predictions=p --vocab-size=9", {"vocab_size": 9}),
    ("metrics --predictions=p", {"vocab_size": None, "predictions": "p"}),
    ("compare a b", {"dir": ["a", "b"], "format": "terminal", "cases": 0}),
    (
      "compare a --split valid b --dir=c --cases=2 --dir d e",
      {"dir": ["a", "b", "c", "d", "e"], "split": "valid", "cases": 2},
    ),
    ("compare", {"dir": []}),
    ("attention --context=a --context b", {"context": ["a", "b"]}),
    ("attention --image=x", {"context": [], "image": "x"}),
    ("compile-check --find_batch", {"find_batch": True}),
    ("compile-check --find-batch=true", {"find_batch": True}),
    ("compile-check --find_batch=false", {"find_batch": False}),
    (
      "compile-check --find_batch --topology=v5e:2x4",
      {"find_batch": True, "topology": "v5e:2x4"},
    ),
    ("compile-check --topology v5e:2x4", {"find_batch": False}),
    ("export --average=3 --dtype=bfloat16", {"average": 3, "checkpoint": None}),
    ("checkpoints --workdir=run --format json", {"format": "json"}),
    ("benchmark", {"output": "benchmark.json"}),
  ],
)
def test_flags(
  monkeypatch: pytest.MonkeyPatch, argv: str, expected: dict[str, object]
) -> None:
  values = parsed(monkeypatch, *argv.split())
  assert {name: getattr(values, name) for name in expected} == expected


def test_a_file_comes_before_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
  pathlib.Path("quickstart").write_text(
    "from empdg_jax.config import Config\n"
    "def get_config():\n  c = Config()\n  c.train.seed = 3\n  return c"
  )
  config = parsed(monkeypatch, "train", "--config=quickstart").config
  assert (config.train.seed, config.data.source) == (3, "official")


def test_a_run_has_its_own_configuration(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  config = parsed(monkeypatch, "chat", "--workdir=run").config
  assert config.eval.beam_size == 7
  argv = ("chat", "--config.eval.beam-size", "2", "--workdir", "run")
  config = parsed(monkeypatch, *argv).config
  assert (config.eval.beam_size, config.train.seed) == (2, 42)


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("trian", "unknown command 'trian'; did you mean 'train'?"),
    ("--completion", "--completion=: expected one of bash, fish, zsh"),
    ("--completion=ksh", "--completion=ksh: expected one of bash, fish, zsh"),
    ("-x", "unknown command '-x'; expected one of prepare, train"),
    (
      "train FILE --config.train.mle_stpes=3",
      "--config.train.mle_stpes: no such field; did you mean "
      "--config.train.mle_steps?",
    ),
    ("train FILE --config.x=3", "--config.x: no such field; see 'empdg train"),
    ("evaluate --config.evil.beam_size=3", "did you mean --config.eval.beam_"),
    (
      "train --wrokdir=x",
      "unknown flag --wrokdir; see 'empdg train --help'; did you mean "
      "--workdir?",
    ),
    ("metrics --config.train.seed=1", "--config.train.seed: no such field"),
    ("metrics --config=x.py", "unknown flag --config; see 'empdg metrics"),
    ("train FILE --workdir", "--workdir has no value; write --workdir=VALUE"),
    ("train FILE --workdir --process_id=1", "--workdir has no value"),
    ("train --config", "--config has no value"),
    ("train FILE --config.train.seed", "--config.train.seed has no value"),
    ("train FILE x", "unexpected argument 'x'; flags are written --name=value"),
    ("train FILE -x", "unexpected argument '-x'"),
    ("train FILE --", "unexpected argument '--'"),
    ("compare a -x", "unexpected argument '-x'"),
    ("compile-check --find_batch x", "unexpected argument 'x'"),
    ("compile-check --find_batch=x", "--find_batch=x: expected true or false"),
    ("train --config.train.mle_steps=3", "--config is missing"),
    ("train --workdir=x --config.train.mle_steps=3", "--config is missing"),
    ("train FILE --workdir=x --process_id=a", "process_id=a: expected a who"),
    ("train FILE --workdir=x --process_id=-1", "process_id=-1: expected at"),
    ("evaluate --samples=1.5", "--samples=1.5: expected a whole number"),
    (
      "prepare FILE --config.train.seed=x",
      "config.train.seed='x': expected a whole number",
    ),
    ("prepare FILE --config.train.seed -1", "train.seed=-1: expected more"),
    ("prepare FILE --config.train.seed=", "config.train.seed='': expected a w"),
    ("prepare FILE --config.train.adam_b1=x", "expected a number"),
    ("prepare FILE --config.train.adam_b1=nan", "expected a finite number"),
    ("prepare FILE --config.train.adam_b1=-1e-3", "expected more than 0"),
    (
      "prepare FILE --config.model.tie_embeddings=maybe",
      "config.model.tie_embeddings='maybe': expected true or false",
    ),
    ("prepare FILE --config.model.kernel_widths=(1", "expected a tuple"),
    (
      "prepare FILE --config.model.norm_order=x",
      "config.model.norm_order='x': expected one of pre, post",
    ),
    ("prepare --config=bad.py", "--config=bad.py: ValueError('two lines')"),
    ("prepare --config=syntax.py", "--config=syntax.py: SyntaxError"),
    ("prepare --config=none.py", "get_config() must return a Config"),
    ("prepare --config=empty.py", "--config=empty.py: KeyError('get_config')"),
    ("prepare --config=typed.py", "config.train.seed=None: expected a whole"),
    ("prepare --config=x", "--config=x: no such file; give a path, or one of "
     "all_turns, default, emoprepend"),
    ("prepare --config=quickstart:1", "--config=quickstart:1: TypeError("),
    ("prepare FILE:1", "quickstart.py:1: TypeError("),
    ("chat --config=x.py --workdir=run", "--config=x.py: a run has its own"),
    ("chat --config x.py", "--config=x.py: a run has its own"),
    ("chat --workdir=run --config.train.seed=1", "the run has 42; only con"),
  ],
)  # fmt: skip
def test_mistakes(
  capsys: pytest.CaptureFixture[str], argv: str, says: str
) -> None:
  files = {
    "bad": "def get_config(): raise ValueError('two lines')",
    "syntax": "def",
    "none": "def get_config(): return None",
    "empty": "",
    "typed": "from empdg_jax.config import Config\n"
    "def get_config():\n  c = Config()\n  c.train.seed = None\n  return c",
  }
  for name, code in files.items():
    pathlib.Path(f"{name}.py").write_text(code)
  line = refused(capsys, *argv.replace("FILE", FILE).split())
  assert line.startswith("empdg: ")
  assert says in line
  assert not pathlib.Path("x").exists()


def test_help_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
  for argv in ([], ["-h"], ["--help"], ["help"]):
    assert main.main(argv) == 0
    said = capsys.readouterr().out
    assert "compile-check" in said
    assert "empdg COMMAND --help" in said


@pytest.mark.parametrize("argv", ["train -h", f"train {FILE} --help"])
def test_help_has_every_field(
  capsys: pytest.CaptureFixture[str], argv: str
) -> None:
  with pytest.raises(SystemExit) as exit_:
    main.main(argv.split())
  assert exit_.value.code == 0
  said = capsys.readouterr().out
  lines = [line.strip("│ \n") for line in said.splitlines()]
  for name in config_lib.field_types():
    (at,) = (
      i for i, line in enumerate(lines) if line.startswith(f"--config.{name} ")
    )
    text = " ".join(lines[at + 1 : at + 11]).partition("--config.")[0]
    assert "(default: " in text
    assert len(text.partition("(default")[0].split()) >= 2, name
  for section in ("data", "model", "train", "eval"):
    assert f"config.{section} options" in said
  assert "--config.model.norm_order {pre,post}" in said


def test_help_of_a_run_has_the_fields_that_can_change(
  capsys: pytest.CaptureFixture[str],
) -> None:
  with pytest.raises(SystemExit):
    main.main(["chat", "--help"])
  said = capsys.readouterr().out
  for name in config_lib.field_types():
    listed = f"--config.{name} " in said
    assert listed == name.startswith(commands.OF_USERS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
  assert main.main(["--version"]) == 0
  assert capsys.readouterr().out == f"empdg-jax {__version__}\n"


def test_help_loads_little() -> None:
  code = (
    "import sys; from empdg_jax import main\n"
    "try: main.main(['metrics', '--help'])\n"
    "except SystemExit: print({'typeguard', 'asyncio', 'jax', 'numpy'}"
    " & set(sys.modules), file=sys.stderr)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stderr == "set()\n"


def test_a_shell_can_complete(capsys: pytest.CaptureFixture[str]) -> None:
  assert main.main(["--completion", "bash"]) == 0
  said = capsys.readouterr().out
  for text in ("compile-check", "--config.train.mle_steps", "--find_batch"):
    assert text in said
  # Of `empdg study create`, which is a command of a command.
  assert "'--dialogues'" in said
  assert "--command." not in said


@pytest.mark.parametrize("argv", [["--help"], ["study", "--help"]])
def test_the_overview_reads_no_source(
  argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  """Tyro would look for the text of a field in the source of `typing`."""
  modules: list[Any] = []
  read = inspect.getsource

  def getsource(thing: Any) -> str:
    modules.append(thing)
    return read(thing)

  monkeypatch.setattr(inspect, "getsource", getsource)
  with contextlib.suppress(SystemExit):
    main.main(argv)
  assert not modules


def test_a_pipe_may_close_early() -> None:
  program = f"{sys.executable} -m empdg_jax.main train --help | head -1"
  done = subprocess.run(
    ["bash", "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.startswith("usage: empdg train")
  assert done.stderr == ""


def test_defaults_survive_a_round_trip() -> None:
  """Every default can be written on the command line as the help shows it."""
  types = config_lib.field_types()
  for name, value in config_lib.flatten(Config()).items():
    text = config_lib.unparse(value)
    assert config_lib.parse(text, types[name]) == value
  old = json.loads(config_lib.to_json(Config()))
  assert list(old["data"])[:2] == ["source", "data_dir"]
