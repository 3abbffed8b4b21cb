"""Capture: a module and its first inputs -> one functional ATen graph with parameters as inputs and roles known."""

from dicompile.capture.arguments import PLAIN, Inputs
from dicompile.capture.autocast import autocast_key
from dicompile.capture.dynamo import capture_by_dynamo, capture_model
from dicompile.capture.inputs import Input, Role, input_names
from dicompile.capture.normalise import Capture, capture_graph, read_inputs
from dicompile.capture.trace import Trace, module_tensors, trace_model

__all__ = [
    "PLAIN",
    "Capture",
    "Input",
    "Inputs",
    "Role",
    "Trace",
    "autocast_key",
    "capture_by_dynamo",
    "capture_graph",
    "capture_model",
    "input_names",
    "module_tensors",
    "read_inputs",
    "trace_model",
]
