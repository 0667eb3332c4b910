"""The version of this package; the same as in ``pyproject.toml``, which a test checks."""

__version__ = "0.1.0"

#: How the clients of this package name themselves to the daemon.
CLIENT = f"ingestd-python/{__version__}"
