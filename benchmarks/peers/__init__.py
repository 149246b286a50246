"""What people would use instead: each in a file of its own, run as ``python -m benchmarks.peers.NAME``.

Each keeps a payment's success durably and at most once, as code that is often written does it. None of them is asked
over a network, decodes a message, keeps evidence or sends surplus back: what paycore does besides is in its favour.
"""
