"""What ``paycore bench`` measures, from an installed wheel as from the sources.

Each measurement is a function from its options and a ``Progress`` to a ``Result``; what it looks like is for
``paycore.cli.bench`` to say. A figure is given only where the counts prove that what was asked was done.
"""
