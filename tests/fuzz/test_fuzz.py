"""Damaged and hostile input: every case is refused in one line, or is right.

Hundreds of seeded mutations of archives, lexicons, vectors, command lines, JSON
lines, run folders and exports. A case fails on a traceback, a line on stderr
that is neither the refusal nor a warning, a wrong exit status, a file left
behind, or memory beyond the limit.
`make test-fuzz` runs them all.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import random
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from empdg_jax import main
from empdg_jax.inference import respond
from empdg_jax.inference.system import load_system

pytestmark = pytest.mark.fuzz

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "before_layout.tar.xz"
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"
# Beyond what the process already has when a case begins.
MEMORY = 2 * 2**30
HUGE = "9" * 400


# Mutations of bytes.


def _flip(data: bytes, rng: random.Random) -> bytes:
  if not data:
    return b"\x00"
  changed = bytearray(data)
  changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
  return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
  at = rng.randrange(len(data) + 1)
  noise = rng.choice(
    [
      b"\x00",
      b"\xff\xfe",
      b"\xed\xb3\xbf",
      b"\n\n",
      b",",
      b"\t",
      b'"',
      b"\x1b[2J",
    ]
    + [
      rng.randbytes(rng.randrange(1, 40)),
      HUGE.encode(),
      b"nan",
      b"-1",
      b"1e309",
    ]
  )
  return data[:at] + noise + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
  start = rng.randrange(len(data) + 1)
  end = min(len(data), start + rng.randrange(200))
  return data[:end] + data[start:end] * rng.randrange(1, 50) + data[end:]


def _delete(data: bytes, rng: random.Random) -> bytes:
  start = rng.randrange(len(data) + 1)
  return data[:start] + data[start + rng.randrange(200) :]


def _shuffle_lines(data: bytes, rng: random.Random) -> bytes:
  lines = data.split(b"\n")
  rng.shuffle(lines)
  return b"\n".join(lines)


def _replace(data: bytes, rng: random.Random) -> bytes:
  del data
  return rng.choice([b"", b"\n", b"{}", b"[]", b"null", rng.randbytes(500)])


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
  _flip, _truncate, _insert, _repeat, _delete, _shuffle_lines, _replace,
)  # fmt: skip


def _mutated(data: bytes, rng: random.Random) -> bytes:
  for _ in range(rng.randrange(1, 4)):
    data = rng.choice(BYTES)(data, rng)
  return data


# Mutations of JSON.

VALUES: tuple[Any, ...] = (
  None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x", "\x1b[2J", "\x00",
  [], {}, [[]], {"a": 1}, 1_000_000, 2**31, "../../etc/passwd",
)  # fmt: skip


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
  """Yields every container with each of its keys."""
  if isinstance(value, dict | list):
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
      yield value, key
      yield from _nodes(value[key])


def _mutated_json(text: str, rng: random.Random) -> str:
  value = json.loads(text)
  for _ in range(rng.randrange(1, 3)):
    nodes = list(_nodes(value))
    if not nodes:
      break
    container, key = rng.choice(nodes)
    match rng.randrange(4):
      case 0 if isinstance(container, dict):
        del container[key]
      case 1 if isinstance(container, dict):
        container[f"{key}x"] = rng.choice(VALUES)
      case _:
        container[key] = rng.choice(VALUES)
  if rng.random() < 0.05:
    return "[" * 100_000 + "]" * 100_000
  return json.dumps(value)


def _mutated_header(data: bytes, rng: random.Random) -> bytes:
  """Changes the names, types, shapes and places of a safetensors file."""
  end = 8 + int.from_bytes(data[:8], "little")
  header = _mutated_json(data[8:end].decode(), rng).encode()
  return len(header).to_bytes(8, "little") + header + data[end:]


# The checks.


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
  """Lets the process have a bounded amount of memory more."""
  with open("/proc/self/status") as file:
    (line,) = (row for row in file if row.startswith("VmData"))
  limit = int(line.split()[1]) * 1024 + MEMORY
  soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
  resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _run(argv: list[str]) -> tuple[int, str, str]:
  """Runs a command; returns its status and what it printed."""
  out, err = io.StringIO(), io.StringIO()
  with (
    _bounded(),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    try:
      status = main.main(argv)
    except SystemExit as error:  # --help.
      status = int(error.code or 0)
  return status, out.getvalue(), err.getvalue()


def _listing() -> set[pathlib.Path]:
  """Returns the files of this test, without prepared and compiled ones."""
  files = {
    path.relative_to(path.cwd()) for path in pathlib.Path.cwd().rglob("*")
  }
  return {path for path in files if path.parts[0] not in ("data", "cache")}


def _check(argv: list[str], allowed: tuple[int, ...] = (0, 2)) -> int:
  """Runs a command, checks all that it leaves, and returns its status."""
  before = _listing()
  status, out, err = _run(argv)
  lines = err.splitlines()
  assert status in allowed, (argv, status, err)
  assert "Traceback" not in out + err, (argv, err)
  assert "\x1b" not in out + err, (argv, err)
  if status:
    assert len(lines) == 1, (argv, err)
    assert lines[0].startswith("empdg: "), (argv, err)
  else:
    assert all(x.startswith(("Warning: ", "Note: ")) for x in lines), (
      argv,
      err,
    )
  assert _listing() == before, argv
  return status


# The material.


def _csv(split: str) -> str:
  header = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,"
  rows = [header + "selfeval,tags"]
  for talk in range(6):
    for turn in range(5):
      rows.append(
        f"{split}{talk},{turn + 1},{('sad', 'proud', 'afraid')[talk % 3]},"
        f"A situation_comma_ number {talk},{turn % 2},"
        f"we talk about thing {talk} in turn {turn} .,,"
      )
  return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with an old run, an export, CSVs, a lexicon and vectors."""
  folder = tmp_path_factory.mktemp("material")
  with tarfile.open(FIXTURE) as archive:
    archive.extractall(folder, filter="data")
  (folder / "csv").mkdir()
  for split in ("train", "valid", "test"):
    (folder / "csv" / f"{split}.csv").write_text(_csv(split))
  with tarfile.open(folder / "data.tar.gz", "w:gz") as archive:
    archive.add(folder / "csv", "empatheticdialogues")
  (folder / "words.txt").write_text("thing\ntalk\njoy\tpositive\t1\n")
  (folder / "vectors.txt").write_text(
    "".join(f"{w} {' '.join(['0.25'] * 6)}\n" for w in ("thing", "talk", "we"))
  )
  (folder / "predictions.jsonl").write_text(
    json.dumps(
      {
        "response": "a b c",
        "reference": "a b d",
        "nll": 3.5,
        "tokens": 4,
        "emotion": "sad",
        "predicted_emotion": "proud",
      }
    )
    + "\n"
  )
  return folder


@pytest.fixture
def inside(
  material: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> pathlib.Path:
  """A folder to work in, with the run's lexicon and an empty input."""
  shutil.copy(material / "lexicon.txt", tmp_path)
  (tmp_path / "no_contexts").touch()
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _prepare(tmp_path: pathlib.Path, *flags: str) -> list[str]:
  return [
    "prepare", QUICKSTART, f"--config.data.data_dir={tmp_path}/data",
    "--config.model.emb_dim=6", *flags,
  ]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_archives(
  seed: int, material: pathlib.Path, inside: pathlib.Path
) -> None:
  rng = random.Random(f"archive{seed}")
  source: pathlib.Path
  if seed % 2:
    source = inside / "data.tar.gz"
    source.write_bytes(_mutated((material / "data.tar.gz").read_bytes(), rng))
  else:
    source = inside / "csv"
    shutil.copytree(material / "csv", source)
    path = source / f"{rng.choice(('train', 'valid', 'test'))}.csv"
    path.write_bytes(_mutated(path.read_bytes(), rng))
  _check(_prepare(inside, f"--config.data.source={source}"))


def _member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, link
  return info


@pytest.mark.parametrize(
  "member",
  [
    _member("../train.csv", tarfile.REGTYPE),
    _member("/train.csv", tarfile.REGTYPE),
    _member("train.csv", tarfile.SYMTYPE, "/etc/passwd"),
    _member("train.csv", tarfile.LNKTYPE, "/etc/passwd"),
    _member("train.csv", tarfile.CHRTYPE),
    _member("train.csv", tarfile.FIFOTYPE),
  ],
  ids=lambda m: f"{m.name}-{m.type.decode()}",
)
def test_hostile_members(
  member: tarfile.TarInfo, material: pathlib.Path, inside: pathlib.Path
) -> None:
  path = inside / "evil.tar"
  with tarfile.open(path, "w") as archive:
    for split in ("train", "valid", "test"):
      archive.add(material / "csv" / f"{split}.csv", f"{split}.csv")
    archive.addfile(member, io.BytesIO(b""))
  assert _check(_prepare(inside, f"--config.data.source={path}")) == 2


@pytest.mark.parametrize("name", ["source", "lexicon", "vectors", "emotions"])
def test_files_that_never_end(
  name: str, material: pathlib.Path, inside: pathlib.Path
) -> None:
  source = f"--config.data.source={material}/csv"
  flag = f"--config.data.{name}=/dev/zero"
  assert _check(_prepare(inside, source, flag)) == 2


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize(
  ("field", "file"), [("lexicon", "words.txt"), ("vectors", "vectors.txt")]
)
def test_files_of_words(
  field: str,
  file: str,
  seed: int,
  material: pathlib.Path,
  inside: pathlib.Path,
) -> None:
  rng = random.Random(f"{field}{seed}")
  path = inside / file
  path.write_bytes(_mutated((material / file).read_bytes(), rng))
  source = f"--config.data.source={material}/csv"
  _check(_prepare(inside, source, f"--config.data.{field}={path}"))


FLAGS = (
  "--config=/nowhere.py", "--config", "--config.train.seed=x",
  "--config.train.seed=99999999999999999999", "--config.model.emb_dim=-2",
  "--config.model.emb_dim=1000000000", "--config.data.source=a\x00b",
  "--config.data.source=foo://x", "--workdir=a\x00b", "--workdir=foo://x",
  "--workdir=", "--bundle=\udcff", "--split=\x1b[2J", "--samples=-1",
  "--samples=1e9", "--checkpoint=best", "--context=a", "--dir=x", "--help",
  "--vocab_size=0", "--vocab_size=99999999999999999999999", "stray", "-x",
  "--predictions=/nowhere", "--average=-3", "--dtype=int8", "--format=x",
  "--config.data.shapes=((1,2),)", "--config.data.shapes=" + "(" * 10_000,
  "--config.train.profile_steps=5:1", "--process_id=3", "--num_processes=2",
  "--coordinator_address=", "--cases=1", "--out=", "--topology=v9:9x9",
  "--config.eval.beam_size=0", "--config.model.name=gpt", "--", "-", "",
  "--input=/nowhere", "--config.nothing=1", "--config.train=3",
  "--port=99999", "--port=x", "--host=", "--study=/nowhere", "--study=a\x00b",
  "--study=foo://x", "--part=x", "--platform=x", "--file=/nowhere",
  "--file=\x1b[2J", "--dialogues=0", "--annotators=1000000000",
  "--controls=0.9", "--controls=nan", "--seed=99999999999",
)  # fmt: skip
COMMANDS = (
  "prepare", "train", "evaluate", "metrics", "compare", "generate", "chat",
  "attention", "checkpoints", "export", "compile-check", "benchmark", "fly", "",
  "demo", "study", "study create", "study serve", "study import",
  "study report", "study fly",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(150))
def test_command_lines(
  seed: int, inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  rng = random.Random(f"flags{seed}")
  monkeypatch.setattr("sys.stdin", io.StringIO(""))
  monkeypatch.setenv("XDG_CACHE_HOME", str(inside / "cache"))
  argv = rng.choice(COMMANDS).split(" ")
  argv += rng.sample(FLAGS, rng.randrange(4))
  _check(argv)


@pytest.mark.parametrize("seed", range(80))
def test_predictions(
  seed: int, material: pathlib.Path, inside: pathlib.Path
) -> None:
  rng = random.Random(f"predictions{seed}")
  text = (material / "predictions.jsonl").read_text()
  path = inside / "p.jsonl"
  if seed % 4:
    path.write_text(text + _mutated_json(text, rng) + "\n")
  else:
    path.write_bytes(_mutated(text.encode(), rng))
  _check(["metrics", f"--predictions={path}"])


@pytest.fixture(scope="module")
def responder(material: pathlib.Path) -> respond.Responder:
  """The export's system, loaded once."""
  return respond.Responder(load_system(material / "export"))


@pytest.mark.parametrize("seed", range(60))
def test_contexts(seed: int, responder: respond.Responder) -> None:
  """Every line is answered, with a response or an error, in valid UTF-8."""
  rng = random.Random(f"context{seed}")
  line = json.dumps({"context": ["i lost my job today", "oh no", "it hurts"]})
  text = _mutated(line.encode(), rng).decode("utf-8", "surrogateescape")
  if seed % 3:
    text = _mutated_json(line, rng)
  if seed % 7 == 0:
    text = '{"context": ["my job \\ud800 is lost"]}'
  lines = [row for row in text.split("\n") if row.strip()]
  with _bounded():
    answers = list(respond.generate(responder, lines, 4))
  assert len(answers) == len(lines)
  for answer in answers:
    json.dumps(answer, ensure_ascii=False).encode("utf-8")
    assert "response" in answer or "error" in answer


@pytest.mark.parametrize("seed", range(60))
def test_run_folders(
  seed: int, material: pathlib.Path, inside: pathlib.Path
) -> None:
  rng = random.Random(f"run{seed}")
  shutil.copytree(material / "run", inside / "run")
  files = sorted(p for p in (inside / "run").rglob("*") if p.is_file())
  names = ["config.json", "vocab.txt"] if seed % 2 else []
  path = rng.choice([inside / "run" / n for n in names] or files)
  if path.name == "config.json" and seed % 4 == 1:
    path.write_text(_mutated_json(path.read_text(), rng))
  elif rng.random() < 0.1:
    path.unlink()
  else:
    path.write_bytes(_mutated(path.read_bytes(), rng))
  # Status 1: the disk itself may be what fails.
  _check(["checkpoints", "--workdir=run"], (0, 1, 2))
  _check(["generate", "--workdir=run", "--input=no_contexts"], (0, 1, 2))


@pytest.mark.parametrize("seed", range(100))
def test_exports(
  seed: int, material: pathlib.Path, inside: pathlib.Path
) -> None:
  """Half of them with the checksums that a stranger would compute."""
  rng = random.Random(f"export{seed}")
  folder = inside / "export"
  shutil.copytree(material / "export", folder)
  path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
  if path.suffix == ".json" and rng.random() < 0.8:
    path.write_text(_mutated_json(path.read_text(), rng))
  elif path.suffix == ".safetensors" and rng.random() < 0.8:
    path.write_bytes(_mutated_header(path.read_bytes(), rng))
  elif rng.random() < 0.05:
    path.unlink()
  else:
    path.write_bytes(_mutated(path.read_bytes(), rng))
  if seed % 2:
    sums = folder / "SHA256SUMS"
    listed = [
      file
      for file in sorted(folder.rglob("*"))
      if file.is_file() and file != sums
    ]
    sums.write_text(
      "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  "
        f"{file.relative_to(folder).as_posix()}\n"
        for file in listed
      )
    )
  _check(["generate", "--bundle=export", "--input=no_contexts"])
