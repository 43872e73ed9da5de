"""The VMs we clamp on to: their memory maps, their control, their devices' state, and what their guests tell."""
