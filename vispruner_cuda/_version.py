"""The version, in the only place where it is written (pyproject.toml and CMake read it here)."""

__version__ = "0.1.0"
