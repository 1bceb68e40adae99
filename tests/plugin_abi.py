"""The C++ interfaces of a TensorRT plugin, called through their vtables as TensorRT calls them.

The layouts are those of the Itanium C++ ABI for the classes that NVIDIA documents (TensorRT C++ API:
IPluginCreatorV3One, IPluginV3, IPluginV3OneCore, IPluginV3OneBuild, IPluginV3OneRuntime, PluginTensorDesc, DimsExprs).
An object begins with a pointer to its vtable. The vtable has one slot per virtual function in the order of declaration,
base class first; the destructor has two. `Interface` compares the kind that every interface gives of itself with its
documented one, so that a wrong layout fails there.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

MAX_DIMS = 8
_POINTER = ctypes.sizeof(c_void_p)

Signature = tuple[int, Any, tuple[Any, ...]]
"""Slot in the vtable, type of the result, types of the arguments."""


class Dims(Structure):
    _fields_ = (("count", c_int32), ("sizes", c_int64 * MAX_DIMS))


class TensorDesc(Structure):
    """PluginTensorDesc. `type` and `format` are DataType and TensorFormat."""

    _fields_ = (("dims", Dims), ("type", c_int32), ("format", c_int32), ("scale", c_float))


class DynamicTensorDesc(Structure):
    _fields_ = (("desc", TensorDesc), ("min", Dims), ("max", Dims), ("opt", Dims))


class DimsExprs(Structure):
    _fields_ = (("count", c_int32), ("expressions", c_void_p * MAX_DIMS))


class FieldCollection(Structure):
    _fields_ = (("count", c_int32), ("fields", c_void_p))


class InterfaceInfo(Structure):
    _fields_ = (("kind", c_char_p), ("major", c_int32), ("minor", c_int32))


_INFO: Signature = (1, InterfaceInfo, ())
_DESCS = (POINTER(TensorDesc), c_int32)
_DYNAMIC = (POINTER(DynamicTensorDesc), c_int32)

CREATOR: dict[str, Signature] = {
    "getInterfaceInfo": _INFO,
    "createPlugin": (4, c_void_p, (c_char_p, POINTER(FieldCollection), c_int32)),
    "getFieldNames": (5, POINTER(FieldCollection), ()),
    "getPluginName": (6, c_char_p, ()),
    "getPluginVersion": (7, c_char_p, ()),
    "getPluginNamespace": (8, c_char_p, ()),
}
PLUGIN: dict[str, Signature] = {
    "getInterfaceInfo": _INFO,
    "getCapabilityInterface": (4, c_void_p, (c_int32,)),
    "clone": (5, c_void_p, ()),
}
CORE: dict[str, Signature] = {
    "getInterfaceInfo": _INFO,
    "getPluginName": (4, c_char_p, ()),
    "getPluginVersion": (5, c_char_p, ()),
    "getPluginNamespace": (6, c_char_p, ()),
}
BUILD: dict[str, Signature] = {
    "getInterfaceInfo": _INFO,
    "configurePlugin": (4, c_int32, (*_DYNAMIC, *_DYNAMIC)),
    "getOutputDataTypes": (5, c_int32, (POINTER(c_int32), c_int32, POINTER(c_int32), c_int32)),
    "getOutputShapes": (
        6,
        c_int32,
        (POINTER(DimsExprs), c_int32, POINTER(DimsExprs), c_int32, POINTER(DimsExprs), c_int32, c_void_p),
    ),
    "supportsFormatCombination": (7, c_bool, (c_int32, POINTER(DynamicTensorDesc), c_int32, c_int32)),
    "getNbOutputs": (8, c_int32, ()),
    "getWorkspaceSize": (9, c_size_t, (*_DYNAMIC, *_DYNAMIC)),
    "getValidTactics": (10, c_int32, (POINTER(c_int32), c_int32)),
    "getNbTactics": (11, c_int32, ()),
    "getTimingCacheID": (12, c_char_p, ()),
    "getFormatCombinationLimit": (13, c_int32, ()),
    "getMetadataString": (14, c_char_p, ()),
}
RUNTIME: dict[str, Signature] = {
    "getInterfaceInfo": _INFO,
    "setTactic": (4, c_int32, (c_int32,)),
    "onShapeChange": (5, c_int32, (*_DESCS, *_DESCS)),
    "enqueue": (
        6,
        c_int32,
        (POINTER(TensorDesc), POINTER(TensorDesc), POINTER(c_void_p), POINTER(c_void_p), c_void_p, c_void_p),
    ),
    "attachToContext": (7, c_void_p, (c_void_p,)),
    "getFieldsToSerialize": (8, POINTER(FieldCollection), ()),
}
CAPABILITIES = (("PLUGIN_V3ONE_CORE", CORE), ("PLUGIN_V3ONE_BUILD", BUILD), ("PLUGIN_V3ONE_RUNTIME", RUNTIME))
"""Name and functions of each capability, at its number in PluginCapabilityType."""


class Interface:
    """A C++ object at an address. Its virtual functions are called by name."""

    def __init__(self, address: int | None, kind: str, functions: Mapping[str, Signature]) -> None:
        assert address, f"{kind}: null"
        self.address = address
        self._functions = functions
        info = self.call("getInterfaceInfo")
        assert (info.kind, info.major) == (kind.encode(), 1), f"{kind}: {info.kind} {info.major}"

    def call(self, name: str, *arguments: Any) -> Any:
        slot, result, types = self._functions[name]
        table = c_void_p.from_address(self.address).value
        assert table is not None
        function = c_void_p.from_address(table + slot * _POINTER).value
        assert function is not None
        return CFUNCTYPE(result, c_void_p, *types)(function)(self.address, *arguments)


def creator(instance: object) -> Interface:
    """The C++ object of a Python subclass of one bound class: pybind11 has its address behind the object's header."""
    address = c_void_p.from_address(id(instance) + object.__basicsize__).value
    return Interface(address, "PLUGIN CREATOR_V3ONE", CREATOR)


def plugin(address: int | None) -> Interface:
    return Interface(address, "PLUGIN", PLUGIN)


def capabilities(of: Interface) -> tuple[Interface, Interface, Interface]:
    """The core, build and runtime capabilities of a plugin."""
    core, build, runtime = (
        Interface(of.call("getCapabilityInterface", number), *capability)
        for number, capability in enumerate(CAPABILITIES)
    )
    return core, build, runtime


def dims(shape: Sequence[int]) -> Dims:
    return Dims(len(shape), (c_int64 * MAX_DIMS)(*shape))


def tensor_desc(shape: Sequence[int], dtype: int, layout: int = 0) -> TensorDesc:
    return TensorDesc(dims(shape), dtype, layout, -1.0)


def dynamic_desc(shape: Sequence[int], dtype: int, layout: int = 0, batches: tuple[int, int] = (1, 2)) -> Any:
    """A tensor whose first axis, where it is -1, has these bounds."""
    low, high = (dims([end if size < 0 else size for size in shape]) for end in batches)
    return DynamicTensorDesc(tensor_desc(shape, dtype, layout), low, high, high)


class Expressions:
    """Symbolic sizes, as the builder passes them to getOutputShapes. A negative size is unknown.

    An IDimensionExpr has a vtable and a pointer to its implementation, whose vtable has isConstant and
    getConstantValue after the destructor. Before a vtable are the offset to the whole object and the type's name,
    which pybind11 reads.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self.builder = ctypes.addressof(self._object("N8nvinfer112IExprBuilderE"))

    def exprs(self, shape: Sequence[int]) -> DimsExprs:
        return DimsExprs(len(shape), (c_void_p * MAX_DIMS)(*(self._size(size) for size in shape)))

    def _size(self, size: int) -> int:
        constant, value = CFUNCTYPE(c_bool, c_void_p)(lambda _: size >= 0), CFUNCTYPE(c_int64, c_void_p)(lambda _: size)
        functions = (c_void_p * 4)(
            None, None, *(ctypes.cast(function, c_void_p).value for function in (constant, value))
        )
        implementation = (c_void_p * 1)(ctypes.addressof(functions))
        self._kept += [constant, value, functions, implementation]
        return ctypes.addressof(self._object("N8nvinfer114IDimensionExprE", ctypes.addressof(implementation)))

    def _object(self, mangled: str, implementation: int = 0) -> Any:
        name = ctypes.create_string_buffer(mangled.encode())
        type_info = (c_void_p * 2)(None, ctypes.addressof(name))
        table = (c_void_p * 4)(0, ctypes.addressof(type_info))
        instance = (c_void_p * 2)(ctypes.addressof(table) + 2 * _POINTER, implementation)
        self._kept += [name, type_info, table, instance]
        return instance
