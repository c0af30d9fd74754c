"""The command line: parse, call, print."""

from dcbench.cli.app import app, main

__all__ = ["app", "main"]
