"""ONNX Runtime through its C interface, where an operator can be a Python function.

The Python interface takes operators from compiled libraries alone. The wheels of onnxruntime hold the library of the C
interface as well. `OrtApi`, its table of functions, only ever grows at the end:
https://onnxruntime.ai/docs/api/c/struct_ort_api.html
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ttt_video_engine.engines.ort import ort
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import Array, HostOrDeviceArray, TensorSpec, check_inputs

Compute = Callable[[Array, Array], None]
"""Computes the output of an operator from its input, (input, output), of one shape and dtype. What it raises fails the
run."""

_VERSION = 16
"""Of the interface: the first in which an operator can report an error."""
_FUNCTIONS = {
    "CreateStatus": 0,
    "GetErrorMessage": 2,
    "CreateEnv": 3,
    "CreateSession": 7,
    "Run": 9,
    "CreateSessionOptions": 10,
    "DisableMemPattern": 17,
    "SetIntraOpNumThreads": 24,
    "CreateCustomOpDomain": 26,
    "CustomOpDomain_Add": 27,
    "AddCustomOpDomain": 28,
    "CreateTensorWithDataAsOrtValue": 49,
    "GetTensorMutableData": 51,
    "GetTensorElementType": 60,
    "GetDimensionsCount": 61,
    "GetDimensions": 62,
    "GetTensorTypeAndShape": 65,
    "CreateCpuMemoryInfo": 69,
    "KernelContext_GetInput": 90,
    "KernelContext_GetOutput": 91,
    "ReleaseStatus": 93,
    "ReleaseSession": 95,
    "ReleaseValue": 96,
    "ReleaseTensorTypeAndShapeInfo": 99,
    "ReleaseSessionOptions": 100,
    "ReleaseCustomOpDomain": 101,
    "AddSessionConfigEntry": 130,
}
"""Function → its place in the table."""
_DTYPES = {1: "float32", 7: "int64", 10: "float16"}
"""ONNXTensorElementDataType → dtype."""
_ELEMENT_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_FATAL, _FAILED, _ARENA, _DEFAULT_MEMORY, _ANY_TYPE, _REQUIRED = 4, 1, 1, 0, 0, 0


class OperatorRunner:
    """A graph in ONNX Runtime on the CPU, whose operators of `domain` are Python functions: name → function.

    Raises BackendError where the graph does not load.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        operators: tuple[str, Mapping[str, Compute]],
        num_threads: int = 0,
    ) -> None:
        self._name = path.name
        self._inputs, self._outputs = inputs, outputs
        domain, functions = operators
        self._operators = [
            _Operator(name, compute) for name, compute in functions.items()
        ]  # the session refers to them
        options, group, session = c_void_p(), c_void_p(), c_void_p()
        _call("CreateSessionOptions", byref(options))
        try:
            _call("SetIntraOpNumThreads", options, c_int(num_threads))
            _call("DisableMemPattern", options)
            _call("AddSessionConfigEntry", options, b"session.intra_op.allow_spinning", b"0")
            _call("CreateCustomOpDomain", domain.encode(), byref(group))
            for operator in self._operators:
                _call("CustomOpDomain_Add", group, byref(operator.table))
            _call("AddCustomOpDomain", options, group)
            _call("CreateSession", _environment(), os.fsencode(path), options, byref(session))
        except BackendError as error:
            _release("ReleaseCustomOpDomain", group)
            raise BackendError(f"{path}: ONNX Runtime cannot load it ({error})") from error
        finally:
            _release("ReleaseSessionOptions", options)
        self._session: c_void_p | None = session
        self._domain = group

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, Array]:
        if self._session is None:
            raise BackendError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self._inputs, inputs)
        given = [np.ascontiguousarray(inputs[spec.name]) for spec in self._inputs]
        results = (c_void_p * len(self._outputs))()
        values: list[c_void_p] = []
        try:
            values += [_value(array) for array in given]
            _call(
                "Run",
                self._session,
                None,
                _names(self._inputs),
                (c_void_p * len(values))(*values),
                c_size_t(len(values)),
                _names(self._outputs),
                c_size_t(len(results)),
                results,
            )
            return {
                spec.name: _view(c_void_p(result)).copy() for spec, result in zip(self._outputs, results, strict=True)
            }
        except BackendError as error:
            raise BackendError(f"{self._name}: ONNX Runtime failed ({error})") from error
        finally:
            for value in (*values, *(c_void_p(result) for result in results)):
                _release("ReleaseValue", value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            _release("ReleaseSession", self._session)
            _release("ReleaseCustomOpDomain", self._domain)
        self._session = None


_OF_OPERATOR = (c_void_p,)
_OF_INDEX = (c_void_p, c_size_t)
_FIELDS: dict[str, tuple[Any, ...]] = {
    "CreateKernel": (c_void_p, c_void_p, c_void_p, c_void_p),
    "GetName": (c_void_p, *_OF_OPERATOR),
    "GetExecutionProviderType": (c_void_p, *_OF_OPERATOR),
    "GetInputType": (c_int, *_OF_INDEX),
    "GetInputTypeCount": (c_size_t, *_OF_OPERATOR),
    "GetOutputType": (c_int, *_OF_INDEX),
    "GetOutputTypeCount": (c_size_t, *_OF_OPERATOR),
    "KernelCompute": (None, c_void_p, c_void_p),
    "KernelDestroy": (None, c_void_p),
    "GetInputCharacteristic": (c_int, *_OF_INDEX),
    "GetOutputCharacteristic": (c_int, *_OF_INDEX),
    "GetInputMemoryType": (c_int, *_OF_INDEX),
    **{
        f"GetVariadic{side}{what}": (c_int, *_OF_OPERATOR)
        for side in ("Input", "Output")
        for what in ("MinArity", "Homogeneity")
    },
    "CreateKernelV2": (c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p)),
    "KernelComputeV2": (c_void_p, c_void_p, c_void_p),
}
"""Functions of an operator, in the order of `OrtCustomOp`: result, arguments."""


class _Table(ctypes.Structure):
    """`OrtCustomOp` of the interface's version 16. Functions that are left out are null."""

    _fields_ = [  # as ctypes has it
        ("version", c_uint32),
        *((name, CFUNCTYPE(*signature)) for name, signature in _FIELDS.items()),
    ]


class _Operator:
    """A table for an operator with one input and one output; `table` is valid as long as this lives."""

    def __init__(self, name: str, compute: Compute) -> None:
        encoded = ctypes.create_string_buffer(name.encode())

        def create(operator: int, api: int, info: int, kernel: Any) -> None:
            kernel[0] = operator  # anything but null

        def run(kernel: int, context: int) -> int | None:
            try:
                compute(*_tensors(c_void_p(context)))
            except Exception as error:  # it must not leave a callback of C
                status: int | None = _function("CreateStatus", c_void_p)(c_int(_FAILED), str(error).encode())
                return status
            return None

        functions: dict[str, Callable[..., Any]] = {
            "GetName": lambda operator: ctypes.addressof(encoded),
            "GetExecutionProviderType": lambda operator: None,  # the CPU's
            **dict.fromkeys(("GetInputType", "GetOutputType"), lambda operator, index: _ANY_TYPE),
            **dict.fromkeys(("GetInputTypeCount", "GetOutputTypeCount"), lambda operator: 1),
            **dict.fromkeys(("GetInputCharacteristic", "GetOutputCharacteristic"), lambda operator, index: _REQUIRED),
            "GetInputMemoryType": lambda operator, index: _DEFAULT_MEMORY,
            "KernelDestroy": lambda kernel: None,
            "CreateKernelV2": create,
            "KernelComputeV2": run,
        }
        self.table = _Table(_VERSION, **{key: CFUNCTYPE(*_FIELDS[key])(made) for key, made in functions.items()})


def _tensors(context: c_void_p) -> tuple[Array, Array]:
    """The input of a kernel, and its output, which is made here."""
    source, target = c_void_p(), c_void_p()
    _call("KernelContext_GetInput", context, c_size_t(0), byref(source))
    array = _view(source)
    shape = (c_int64 * array.ndim)(*array.shape)
    _call("KernelContext_GetOutput", context, c_size_t(0), shape, c_size_t(array.ndim), byref(target))
    return array, _view(target)


def _value(array: Array) -> c_void_p:
    """A tensor of ONNX Runtime in the memory of `array`."""
    value, shape, rank = c_void_p(), (c_int64 * array.ndim)(*array.shape), c_size_t(array.ndim)
    data, size, kind = c_void_p(array.ctypes.data), c_size_t(array.nbytes), c_int(_ELEMENT_TYPES[array.dtype.name])
    _call("CreateTensorWithDataAsOrtValue", _memory(), data, size, shape, rank, kind, byref(value))
    return value


def _view(value: c_void_p) -> Array:
    """A tensor of ONNX Runtime as an array in the same memory."""
    info, number, rank, data = c_void_p(), c_int(), c_size_t(), c_void_p()
    _call("GetTensorTypeAndShape", value, byref(info))
    try:
        _call("GetTensorElementType", info, byref(number))
        _call("GetDimensionsCount", info, byref(rank))
        shape = (c_int64 * rank.value)()
        _call("GetDimensions", info, shape, rank)
    finally:
        _release("ReleaseTensorTypeAndShapeInfo", info)
    _call("GetTensorMutableData", value, byref(data))
    dtype = np.dtype(_DTYPES[number.value])
    if not prod(shape) or data.value is None:
        return np.empty(tuple(shape), dtype)
    content = (ctypes.c_byte * (prod(shape) * dtype.itemsize)).from_address(data.value)
    return np.ndarray(tuple(shape), dtype, memoryview(content))


def _names(specs: tuple[TensorSpec, ...]) -> Any:
    return (c_char_p * len(specs))(*(spec.name.encode() for spec in specs))


def _call(name: str, *arguments: Any) -> None:
    """Raises BackendError with the first line of what ONNX Runtime says where the function fails."""
    status = _function(name, c_void_p)(*arguments)
    if status:
        message = _function("GetErrorMessage", c_char_p)(c_void_p(status)).decode(errors="replace")
        _release("ReleaseStatus", c_void_p(status))
        raise BackendError(message.strip().splitlines()[0][:300])


def _release(name: str, handle: c_void_p) -> None:
    if handle:
        _function(name, None)(handle)


@cache
def _function(name: str, result: Any) -> Callable[..., Any]:
    table = ctypes.cast(_table(), POINTER(c_void_p))
    found: Callable[..., Any] = ctypes.cast(c_void_p(table[_FUNCTIONS[name]]), CFUNCTYPE(result))
    return found


@cache
def _table() -> c_void_p:
    """The functions of the library beside the module. Raises BackendError where the wheel has none."""
    folder = Path(ort.__file__).parent / "capi"
    paths = [path for pattern in ("libonnxruntime.*", "onnxruntime.dll") for path in folder.glob(pattern)]
    if not paths:
        raise BackendError(f"{folder}: has no library of ONNX Runtime's C interface; run: pip install -U onnxruntime")
    base = ctypes.CDLL(str(paths[0])).OrtGetApiBase
    base.restype = POINTER(CFUNCTYPE(c_void_p, c_uint32))
    return c_void_p(base()[0](_VERSION))


@cache
def _environment() -> c_void_p:
    environment = c_void_p()
    _call("CreateEnv", c_int(_FATAL), b"ttt-video", byref(environment))
    return environment


@cache
def _memory() -> c_void_p:
    memory = c_void_p()
    _call("CreateCpuMemoryInfo", c_int(_ARENA), c_int(_DEFAULT_MEMORY), byref(memory))
    return memory
