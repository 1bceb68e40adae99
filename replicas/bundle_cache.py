"""Bundles from an object store: fetched once a machine into the user's cache, each file held to its digest."""

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from ttt_video_engine.replicas.store import Store
from ttt_video_engine.runtime.bundle import MANIFEST, Bundle, open_bundle
from ttt_video_engine.runtime.errors import BundleError, OutputError
from ttt_video_engine.runtime.files import check_space, make_folder, sha256_of, sync, writing
from ttt_video_engine.runtime.user_cache import cache_folder

_ATTEMPTS = 2
"""Downloads of a file before one with another digest is the store's fault."""


def fetch_bundle(store: Store) -> Path:
    """The folder of a bundle, which is complete. Processes of one machine wait for the one that fetches it.

    The folder is named after the digest of `bundle.json`, so that another bundle at the same URI is another folder. A
    fetch that was stopped goes on with the files that it has. Raises BundleError for files without their digest.
    """
    try:
        manifest = store.read(MANIFEST)
    except FileNotFoundError as error:
        raise BundleError(f"{store.uri}: is not a bundle ({MANIFEST} is missing)") from error
    cache = cache_folder("bundles")
    if cache is None:
        raise OutputError(f"{store.uri}: needs a folder to be fetched to; set XDG_CACHE_HOME")
    folder = cache / hashlib.sha256(manifest).hexdigest()
    with writing(folder):
        make_folder(cache)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            with writing(partial):
                make_folder(partial)
                (partial / MANIFEST).write_bytes(manifest)
            _complete(store, open_bundle(partial))
            with writing(folder):
                # After the others, as `Bundle.check` reads what is newer than the manifest.
                os.utime(partial / MANIFEST)
                sync(partial / MANIFEST)
                os.rename(partial, folder)
                sync(cache)
    return folder


def _complete(store: Store, bundle: Bundle) -> None:
    """Fetches the files that a folder lacks. `open_bundle` has checked that no name leaves it."""
    files = bundle.manifest.files
    missing = {name: entry for name, entry in files.items() if not _is_whole(bundle, name)}
    there = store.files() if missing else {}
    for name, entry in missing.items():
        if there.get(name) != entry.size:
            found = f"has {there[name]} bytes, not {entry.size}" if name in there else "is missing"
            raise BundleError(f"{store.uri}: {name} {found}; upload the bundle again")
    check_space(bundle.root, {"bundle": sum(entry.size for entry in missing.values())})
    for name, entry in missing.items():
        for _ in range(_ATTEMPTS):
            store.download(name, bundle.path(name), entry.size)
            if _is_whole(bundle, name):
                break
        else:
            bundle.path(name).unlink()
            raise BundleError(f"{store.uri}: {name} has not the digest that {MANIFEST} states; upload the bundle again")


def _is_whole(bundle: Bundle, name: str) -> bool:
    path, entry = bundle.path(name), bundle.manifest.files[name]
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256
