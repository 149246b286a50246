"""The one place that knows everyone: builds a server from its settings, runs it, and takes it down in order.

``serve`` runs one process that does everything; ``supervisor`` runs several of them as workers on one address. What
only the supervisor needs knows nothing of gRPC and of databases: it is to stay small, and to outlive its workers.
"""
