"""Capture: a module and its first inputs -> one functional ATen graph with parameters as inputs and roles known."""

from dicompile.capture.dynamo import capture_model
from dicompile.capture.inputs import Input, Role, input_names
from dicompile.capture.normalise import Capture, capture_graph, read_inputs

__all__ = ["Capture", "Input", "Role", "capture_graph", "capture_model", "input_names", "read_inputs"]
