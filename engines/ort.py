"""ONNX Runtime, imported with its telemetry off.

ONNX Runtime 1.32 otherwise writes a device id and a database of events into the user's cache folder when it is
imported, and uploads the events. It reads the variable once, at that moment, so all code here imports it from this
module.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort  # reads the variable

__all__ = ["ort"]
