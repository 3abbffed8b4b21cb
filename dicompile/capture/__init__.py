"""Capture: a module and its first inputs -> one functional ATen graph with parameters as inputs and roles known."""

from dicompile.capture.ambient import ambient
from dicompile.capture.arguments import Arguments, bind_positions, is_number, with_python_numbers
from dicompile.capture.call import (
    capture_call,
    capture_functional,
    capture_model,
    capture_resized,
    normalised,
    values_of,
)
from dicompile.capture.captured import Captured
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.capture.guards import Guards, Pins
from dicompile.capture.normalise import Capture, capture_graph, read_inputs
from dicompile.capture.numbers import open_numbers
from dicompile.capture.resized import marked_dims, resized_inputs
from dicompile.capture.roles import NO_TIMESTEP, NOTHING_SAID, Input, Role, Said, check_names, input_names
from dicompile.capture.shared import CAPTURES, MOST_CAPTURES, Known, key_of_class, known_capture

__all__ = [
    "CAPTURES",
    "MOST_CAPTURES",
    "NOTHING_SAID",
    "NO_TIMESTEP",
    "Arguments",
    "Capture",
    "Captured",
    "Guards",
    "Input",
    "Known",
    "Pins",
    "Role",
    "Said",
    "ambient",
    "bind_positions",
    "capture_by_dynamo",
    "capture_call",
    "capture_functional",
    "capture_graph",
    "capture_model",
    "capture_resized",
    "check_names",
    "input_names",
    "is_number",
    "key_of_class",
    "known_capture",
    "marked_dims",
    "normalised",
    "open_numbers",
    "read_inputs",
    "resized_inputs",
    "values_of",
    "with_python_numbers",
]
