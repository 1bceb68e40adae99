"""S3 on loopback: moto's server in a thread of this process, which can be stopped and started with what it holds."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from moto.server import ThreadedMotoServer

BUCKET = "films"


class ObjectStore:
    """A server on a port of its own, and what it holds."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "of-a-test",
            "AWS_SECRET_ACCESS_KEY": "of-a-test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port)
        self._server.start()

    def reset(self) -> None:
        """Empties it, but for the bucket."""
        reset = urllib.request.Request(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        with urllib.request.urlopen(reset):
            pass
        self._system().mkdir(BUCKET)

    def files(self, prefix: str) -> dict[str, bytes]:
        """The objects below a prefix of the bucket."""
        top = f"{BUCKET}/{prefix}/"
        system = self._system()
        return {path.removeprefix(top): system.cat_file(path) for path in system.find(top)}

    def write(self, name: str, content: bytes) -> None:
        self._system().pipe_file(f"{BUCKET}/{name}", content)

    def remove(self, prefix: str) -> None:
        self._system().rm(f"{BUCKET}/{prefix}", recursive=True)

    def _system(self) -> "fsspec.AbstractFileSystem":
        return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An empty store with the bucket `films`, which the environment of this process names."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        store.reset()  # moto holds what an earlier one held
        yield store
    finally:
        store.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
