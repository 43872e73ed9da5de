"""Serves faults and places pages: the only writer of Residency and the only user of a guest's userfaultfd."""
