"""Memory that is near and far: which node each vCPU should run on, and which pages should follow it, hottest first.

Pure but for ``measuring``: topologies, heat and clocks are passed in, and decisions come out as data.
"""
