"""The version, where setuptools and the command line read it."""

__version__ = "0.1.0"
