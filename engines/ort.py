"""ONNX Runtime, imported with its telemetry off.

Otherwise, ONNX Runtime 1.32 writes a device id and a database of events into the user's cache folder on import, and
uploads the events. It reads the variable only on import, so all code of this project imports it from this module.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort  # reads the variable

__all__ = ["ort"]
