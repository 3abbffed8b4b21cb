"""Serving: one model for many requests at once, in batches that form anew at every step."""

from dicompile.serve.batcher import Batcher, Served
from dicompile.serve.request import Request

__all__ = ["Batcher", "Request", "Served"]
