"""The host's daemon: engines, the peer port that other agents call, and the local API."""
