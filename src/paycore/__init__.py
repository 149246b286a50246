"""paycore: a payment core that charges every order exactly once or not at all.

This module holds only the version. What to import instead: `paycore.client` to talk to a server,
`paycore.v1` for the generated messages. Everything else belongs to the server.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("paycore")
"""The version of the installed distribution, for example "0.1.0"."""
