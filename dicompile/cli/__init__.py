"""The command line: ``dicompile demo``, ``inspect``, ``train-router``, ``router``."""

from dicompile.cli.main import main

__all__ = ["main"]
