"""A stand-in for Cloud Storage: the part of its JSON API that clients use.

Objects live in memory and have generations, so that conditional requests behave
as they do with the real service.
"""

import contextlib
import dataclasses
import email
import email.policy
import http.server
import itertools
import json
import threading
from collections.abc import Generator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclasses.dataclass
class _Object:
  data: bytes
  generation: int


class _Error(Exception):
  """A failed request; the argument is the HTTP status."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: "FakeStorage"

  def _answer(
    self, status: int, body: bytes = b"", **headers: str | int
  ) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    with contextlib.suppress(BrokenPipeError):  # The client lost interest.
      self.wfile.write(body)

  def _json(self, value: Any) -> None:
    self._answer(
      200, json.dumps(value).encode(), Content_Type="application/json"
    )

  def _handle(self) -> None:
    length = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(length)
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    try:
      with self.server.lock:
        self._route(body)
    except _Error as error:
      status = int(error.args[0])
      message = {"error": {"code": status, "message": f"status {status}"}}
      if status == 304:  # This status allows no body.
        self._answer(status)
        return
      self._answer(
        status, json.dumps(message).encode(), Content_Type="application/json"
      )

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle  # noqa: N815

  def _route(self, body: bytes) -> None:
    server = self.server
    if server.forbidden:
      raise _Error(403)
    url = urlsplit(self.path)
    query = {k: v[0] for k, v in parse_qs(url.query).items()}
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    kind = parts.pop(0) if parts[0] in ("upload", "download", "batch") else ""
    if kind == "batch":
      self._batch(body)
      return
    objects = server.objects
    name = parts[5] if len(parts) > 5 else None
    if kind == "upload":
      self._upload(query, body)
    elif len(parts) <= 4:
      self._json({"name": server.bucket, "kind": "storage#bucket"})
    elif name is None:
      self._list(query)
    elif parts[6:] and parts[6] in ("rewriteTo", "copyTo", "moveTo"):
      copy = server.put(parts[-1], self._find(name, query).data)
      if parts[6] == "moveTo":
        del objects[name]
      rewritten = {"done": True, "resource": copy}
      self._json(rewritten if parts[6] == "rewriteTo" else copy)
    elif self.command == "DELETE":
      self._find(name, query)
      del objects[name]
      self._answer(204)
    elif self.command == "PATCH":
      self._json(server.describe(name))
    elif query.get("alt") == "media" or kind == "download":
      self._read(self._find(name, query))
    else:
      self._find(name, query)
      self._json(server.describe(name))

  def _find(self, name: str, query: dict[str, str]) -> _Object:
    self._check(name, query)
    if name not in self.server.objects:
      raise _Error(404)
    return self.server.objects[name]

  def _check(self, name: str, query: dict[str, str]) -> None:
    """Checks a request's conditions on the object's generation."""
    found = self.server.objects.get(name)
    generation = found.generation if found else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
      raise _Error(412)
    if int(query.get("ifGenerationNotMatch", -1)) == generation:
      raise _Error(304)

  def _read(self, found: _Object) -> None:
    headers = {"x-goog-generation": found.generation}
    wanted = self.headers.get("Range")
    if not wanted:
      self._answer(200, found.data, **headers)
      return
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    total = len(found.data)
    begin = int(first) if first else max(0, total - int(last))
    end = min(total, int(last) + 1) if first and last else total
    if begin >= total:
      raise _Error(416)
    content_range = f"bytes {begin}-{end - 1}/{total}"
    self._answer(
      206, found.data[begin:end], Content_Range=content_range, **headers
    )

  def _list(self, query: dict[str, str]) -> None:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], set()
    for name in sorted(self.server.objects):
      if not name.startswith(prefix):
        continue
      rest = name.removeprefix(prefix)
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
      else:
        items.append(self.server.describe(name))
    self._json({"items": items, "prefixes": sorted(prefixes)})

  def _upload(self, query: dict[str, str], body: bytes) -> None:
    server = self.server
    kind = query["uploadType"]
    if kind == "multipart":
      header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n"
      message = email.message_from_bytes(
        header.encode() + body, policy=email.policy.HTTP
      )
      about, content = message.get_payload()
      name = json.loads(about.get_payload())["name"]
      body = content.get_payload(decode=True)
    elif kind == "resumable" and "upload_id" not in query:
      name = query.get("name") or json.loads(body)["name"]
      self._check(name, query)
      upload = str(next(server.numbers))
      server.uploads[upload] = name, b""
      host = self.headers["Host"]
      self._answer(200, Location=f"http://{host}{self.path}&upload_id={upload}")
      return
    elif kind == "resumable":
      name, before = server.uploads[query["upload_id"]]
      body = before + body
      if self.headers.get("Content-Range", "").endswith("/*"):
        server.uploads[query["upload_id"]] = name, body
        self._answer(308, Range=f"bytes=0-{len(body) - 1}")
        return
    else:
      name = query["name"]
    self._check(name, query)
    if server.refused and server.refused in name:
      raise _Error(403)
    self._json(server.put(name, body))

  def _batch(self, body: bytes) -> None:
    """Deletes several objects, each named by a part of the message."""
    header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n"
    message = email.message_from_bytes(header.encode() + body)
    answers = []
    for part in message.get_payload():
      request = part.get_payload().split()
      name = unquote(urlsplit(request[1]).path.split("/o/")[1])
      found = self.server.objects.pop(name, None)
      status = "204 No Content" if found else "404 Not Found"
      answers.append(
        "--answers\r\nContent-Type: application/http\r\n"
        f"Content-ID: <response-{part['Content-ID'].strip('<>')}>\r\n\r\n"
        f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"
      )
    self._answer(
      200,
      ("".join(answers) + "--answers--\r\n").encode(),
      Content_Type="multipart/mixed; boundary=answers",
    )

  def log_message(self, format: str, *args: Any) -> None:
    """Logs nothing."""


class FakeStorage(http.server.ThreadingHTTPServer):
  """The server, on a free port of this machine.

  Attributes:
    bucket: The one bucket's name.
    objects: Its objects by name.
    forbidden: Whether every request is refused.
    refused: Writes to objects with this in their name fail; "" refuses none.
  """

  daemon_threads = True

  def __init__(self, bucket: str) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.bucket = bucket
    self.objects: dict[str, _Object] = {}
    self.uploads: dict[str, tuple[str, bytes]] = {}
    self.forbidden = False
    self.refused = ""
    self.lock = threading.Lock()
    self.numbers = itertools.count(1)

  @property
  def environment(self) -> dict[str, str]:
    """The environment variables that direct all clients to this server."""
    url = f"http://127.0.0.1:{self.server_port}"
    return {
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
      "GOOGLE_CLOUD_PROJECT": "test",
      # Otherwise gcsfs asks for the kind of bucket, over gRPC.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Ignores clients that hang up."""

  def put(self, name: str, data: bytes) -> dict[str, Any]:
    """Writes an object and describes it."""
    self.objects[name] = _Object(data, next(self.numbers))
    return self.describe(name)

  def describe(self, name: str) -> dict[str, Any]:
    """Returns an object's metadata."""
    found = self.objects[name]
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": self.bucket,
      "generation": str(found.generation),
      "metageneration": "1",
      "size": str(len(found.data)),
      "updated": "2026-01-01T00:00:00.000Z",
      "timeCreated": "2026-01-01T00:00:00.000Z",
    }


@contextlib.contextmanager
def serve(bucket: str) -> Generator[FakeStorage]:
  """Yields the running server."""
  server = FakeStorage(bucket)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
