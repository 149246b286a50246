"""What paycore knows about money, and nothing of where it is kept or who asks.

Everything here is pure: no I/O, no clock, no randomness. Times, ids and facts are passed in.
"""
