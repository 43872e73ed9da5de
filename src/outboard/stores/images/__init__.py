"""Disk images of VMs, read from outside while QEMU has them open: layers, and an index of their blocks by content."""
