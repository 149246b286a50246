"""The one place that knows everyone: builds a server from its settings, runs it, and takes it down in order."""

from paycore.app.serve import Serving, StartRefusedError, serve

__all__ = ["Serving", "StartRefusedError", "serve"]
