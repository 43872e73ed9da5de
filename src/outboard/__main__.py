"""``python -m outboard`` is ``outboard``."""

from outboard.cli import main

main()
