"""The demo's server: its port, its rules for browsers, its end."""

import contextlib
import importlib.util
import ipaddress
import os
import socket
from typing import Any

from empdg_jax.config import InputError

_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
  "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
  "font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
  "form-action 'self'; frame-ancestors 'self'"
)


def require_extra() -> None:
  """Raises InputError unless the extra `web` is installed."""
  if importlib.util.find_spec("gradio") is None:
    raise InputError(
      "empdg demo needs Gradio, of the extra 'web'; in a clone: "
      "pip install -e '.[web]'"
    )


def is_loopback(host: str) -> bool:
  """Returns whether only this machine can reach a host name or address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def open_socket(host: str, port: int) -> socket.socket:
  """Opens the port of the page, before anything slow.

  Raises:
    InputError: The port is in use or not allowed, or there is no such host.
  """
  if port > 65_535:
    raise InputError(f"--port={port}: expected at most 65535")
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    return socket.create_server(address[:2], family=family)
  except (OSError, UnicodeError) as error:
    if isinstance(error, socket.gaierror | UnicodeError):
      raise InputError(
        f"--host={host}: expected an address of this machine, such as 0.0.0.0"
      ) from error
    # Python's own text repeats the address.
    reason = os.strerror(error.errno or 0)
    raise InputError(
      f"--host={host} --port={port}: cannot listen there ({reason}); give "
      "another port, or 0 for any that is free"
    ) from error


def url(listening: socket.socket) -> str:
  """Returns the address of the page on this machine."""
  host, port = listening.getsockname()[:2]
  # Replaces an address that means all interfaces; binds none.
  loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # nosec B104
  host = loopback.get(host, host)
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _with_policy(app: Any) -> Any:
  """Forbids pages to load anything from another host."""

  async def answer(scope: Any, receive: Any, send: Any) -> None:
    async def send_with_policy(message: Any) -> None:
      if message["type"] == "http.response.start":
        policy = (b"content-security-policy", _POLICY.encode())
        referrer = (b"referrer-policy", b"no-referrer")
        message["headers"] = [*message["headers"], policy, referrer]
      await send(message)

    await app(scope, receive, send_with_policy)

  return answer


def make_app(demo: Any, *, loopback: bool) -> Any:
  """Returns the page as an ASGI application.

  Args:
    demo: The page's behaviour.
    loopback: Whether it is for this machine alone; other names for it, which
      another page's scripts could make up, are then refused.
  """
  import fastapi
  from starlette.middleware.trustedhost import TrustedHostMiddleware

  from empdg_jax.web import demo_page

  # No pages of FastAPI's own: its documentation loads scripts from elsewhere.
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  if loopback:
    hosts = ["localhost", "127.0.0.1", "[::1]"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
  demo_page.mount(app, demo)
  return _with_policy(app)


def serve(app: Any, listening: socket.socket) -> None:
  """Serves the page until Ctrl-C or SIGTERM."""
  import uvicorn

  config = uvicorn.Config(
    app,
    log_level="warning",
    # Pages keep a connection open, which would never close by itself.
    timeout_graceful_shutdown=1,
  )
  with contextlib.closing(listening):
    uvicorn.Server(config).run(sockets=[listening])
