"""The testbed and the demo: a busy VM is evicted to a second host, by Outboard and by QEMU itself, side by side.

``python -m demo`` from the project's root, or ``script/demo``.
"""
