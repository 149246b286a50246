"""``python -m paycore.cli``: the command where the script ``paycore`` is not on PATH."""

from paycore.cli import main

main()
