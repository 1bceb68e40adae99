"""An object store at a URI such as s3://bucket/prefix, through fsspec, with retries.

Credentials, endpoints and regions come from the environment that the store's own library reads. Only names below the
prefix are touched. An object must appear whole or not at all, as S3, GCS and Azure have it.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ttt_video_engine.runtime.errors import BackendError, ConfigError, OutputError, StoreUnreachable, brief
from ttt_video_engine.runtime.files import atomic_write

PATIENCE = 90.0
"""Seconds that a store may be gone. A call that hangs ends by the timeouts of its library, and may exceed them."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_OPTIONS: dict[str, dict[str, Any]] = {
    # One attempt a call: the retries here say that they wait. s3fs itself repeats what S3 asks to be repeated.
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}},
}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_WRONG = (PermissionError, ValueError, TypeError, NotImplementedError)
_WRONG_IN_S3 = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")
"""Errors that waiting does not cure, those of S3's library by name: it may not be installed."""

T = TypeVar("T")
Warn = Callable[[str], None]


def is_uri(place: str) -> bool:
    """Whether a place is the URI of a store, and not a path."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """The path that a place is, which may be written as file:///path. Raises ConfigError for one of another machine."""
    if not place.startswith("file://"):
        return Path(place)
    url = urlsplit(place)
    if url.netloc not in ("", "localhost"):
        raise ConfigError(f"{place}: names a file of the machine {url.netloc}; write file:///PATH")
    return Path(unquote(url.path))


class Store:
    """The objects below a URI, by their names relative to it.

    Every call waits for a store that does not answer, at most PATIENCE seconds, and says so once with `warn`; then it
    raises StoreUnreachable. What the store refuses raises OutputError at once.
    """

    def __init__(self, uri: str, warn: Warn) -> None:
        self.uri, self._warn = uri.rstrip("/"), warn
        self._system, self._root = _open(self.uri)

    def files(self, below: str = "") -> dict[str, int]:
        """Sizes in bytes by name. An empty one for a prefix that does not exist yet."""
        top = f"{self._root}/{below}".rstrip("/")
        with self._in_a_bucket():
            found = self._patiently(lambda: self._system.find(top, detail=True))
        return {path.removeprefix(f"{self._root}/"): int(about["size"]) for path, about in found.items()}

    def read(self, name: str) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError where there is none."""
        return bytes(self._patiently(lambda: self._system.cat_file(self._key(name))))

    def upload(self, path: Path, name: str) -> None:
        """Writes a file. Raises FileNotFoundError where it is gone."""
        with self._in_a_bucket(path):
            self._patiently(lambda: self._system.put_file(str(path), self._key(name)))

    def download(self, name: str, path: Path, size: int) -> None:
        """Writes an object of so many bytes to a path, which has it whole or not at all.

        Raises FileNotFoundError where there is none, OutputError where the disk is full or fails.
        """

        def fetch(partial: Path) -> None:
            self._system.get_file(self._key(name), str(partial))
            if (got := partial.stat().st_size) != size:
                raise ConnectionError(f"{name} ended after {got} of {size} bytes")

        try:
            with atomic_write(path) as partial:
                self._patiently(lambda: fetch(partial))
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            raise

    def remove(self, name: str) -> None:
        """Removes an object if it is there."""
        with suppress(FileNotFoundError):
            self._patiently(lambda: self._system.rm_file(self._key(name)))

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _in_a_bucket(self, path: Path | None = None) -> Iterator[None]:
        """Says that the bucket is missing where it is not the local path that is."""
        try:
            yield
        except FileNotFoundError as error:
            if path is not None and not path.exists():
                raise
            raise OutputError(f"{self.uri}: {brief(error)}; name a bucket that exists") from error

    def _patiently(self, call: Callable[[], T]) -> T:
        """What a call returns, which is made again until the store answers. Raises FileNotFoundError as it comes."""
        start, pause, told = time.monotonic(), _FIRST_PAUSE, False
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # the libraries of stores have no common base class
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the local disk
                if isinstance(error, _WRONG) or type(error).__name__ in _WRONG_IN_S3:
                    raise OutputError(f"{self.uri}: {brief(error)}; check its name and the credentials") from error
                waited = time.monotonic() - start
                if waited + pause > PATIENCE:
                    raise StoreUnreachable(
                        f"{self.uri}: has not answered for {waited:.0f} s ({brief(error)}); what is done is kept on "
                        "this machine; run again"
                    ) from error
                if not told:
                    self._warn(f"{self.uri}: does not answer ({brief(error)}); tried again for {PATIENCE:.0f} s")
                told = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _open(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it. Raises ConfigError, or BackendError where its package is missing."""
    import fsspec  # here, as commands that use no store need not wait for it

    protocol = uri.partition("://")[0]
    try:
        system, root = fsspec.url_to_fs(
            uri, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(protocol, {})
        )
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        cure = f"pip install 'ttt-video-engine[{extra}]'" if extra else f"pip install the fsspec package of {protocol}"
        raise BackendError(f"{uri}: {brief(error)}; run: {cure}") from error
    except ValueError as error:
        raise ConfigError(f"{uri}: {brief(error)}; such as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a path") from error
    if not root.strip("/"):
        raise ConfigError(f"{uri}: names no bucket; such as {protocol}://BUCKET/PREFIX")
    return system, root.rstrip("/")
