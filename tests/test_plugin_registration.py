"""The TTT plugins in TensorRT's registry: all of them or none, and the first error is the one that is shown."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packages import tensorrt_rtx

from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.plugin import registered_plugins
from ttt_video_engine.runtime import ttt_op
from ttt_video_engine.runtime.errors import BackendError


class Registry:
    """Takes `most` creators; with `broken` it fails when one is to be removed."""

    def __init__(self, most: int = 9, *, broken: bool = False) -> None:
        self.names: list[str] = []
        self._most, self._broken = most, broken

    def register_creator(self, creator: Any, namespace: str) -> bool:
        if len(self.names) == self._most:
            return False
        self.names.append(creator.name)
        return True

    def deregister_creator(self, creator: Any) -> bool:
        self.names.remove(creator.name)
        return not self._broken


def package(registry: Registry) -> TensorRT:
    """TensorRT-RTX itself but for its registry, of which a process has only one."""
    real = tensorrt_rtx()
    api = SimpleNamespace(**{name: getattr(real.api, name) for name in dir(real.api)})
    api.get_plugin_registry = lambda: registry
    return dataclasses.replace(real, api=api)


def test_a_refused_plugin_leaves_none_registered(tmp_path: Path) -> None:
    registry = Registry(most=3)
    with pytest.raises(BackendError, match="TTTMLP"), registered_plugins(package(registry), tmp_path, "sm_89"):
        pass
    assert registry.names == []


def test_an_error_within_the_block_is_the_one_that_is_shown(tmp_path: Path) -> None:
    registry = Registry(broken=True)
    with pytest.raises(KeyError, match="first"), registered_plugins(package(registry), tmp_path, "sm_89"):
        assert sorted(registry.names) == sorted([*ttt_op.OP_TYPES.values()] * 3), "of three versions"
        raise KeyError("first")
    assert registry.names == []
