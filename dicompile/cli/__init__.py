"""The command line: ``dicompile demo``, ``dicompile inspect``."""

from dicompile.cli.main import main

__all__ = ["main"]
