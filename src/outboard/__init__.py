"""Outboard: the memory engine for virtual machines that clamps on outside the VMM."""
