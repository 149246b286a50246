"""Measurements of paycore against a baseline and against the limit of the machine, taken in one run.

``python -m benchmarks`` runs them all; each module ``<name>_bench`` offers ``main(arguments) -> exit code``.
"""
