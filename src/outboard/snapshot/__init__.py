"""Snapshots of running VMs, and VMs restored from them."""
