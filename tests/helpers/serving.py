"""An HTTP server in a thread of the test's process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from dmdr.remote import server as server_module


@contextmanager
def serving(app: Starlette, port: int = 0, patience: int = 5) -> Iterator[str]:
    """The address of an application in a thread of this process; at its end, requests have `patience` seconds left."""
    bound = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=server_module._Protocol, log_level="critical", lifespan="on", timeout_graceful_shutdown=patience
        )
    )
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
