"""A bank simulator: somebody else's system, in a process of its own, with its own books on its own disk.

It knows nothing of paycore's rules. Merchants reach it by its HTTP API (docs/channels.md), it reaches them by
notifications, and the forwarder carries those to paycore's gRPC server as any gateway would.

Reading order: ``books`` (what a bank decides), ``faults`` (what may go wrong), ``disk`` (what is kept), ``bank``
(the operations), ``sender`` (notifications), ``merchant_api``, ``pages``, ``driver_api`` (HTTP), ``forwarder``.
"""
