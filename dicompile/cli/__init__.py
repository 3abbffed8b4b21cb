"""The command line: ``dicompile demo``, ``inspect``, ``bench``, ``train-router``, ``router``."""

from dicompile.cli.main import main

__all__ = ["main"]
