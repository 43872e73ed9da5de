"""Which pages of a guest equal which blocks of its disks.

A room of its own beside the pager and the traces: whoever sends, saves or drops pages looks here first, and none of
them is another's. What an image holds is the stores' to know, what a guest holds the guest's.
"""
