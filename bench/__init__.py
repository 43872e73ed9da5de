"""One script per claim: ``script/bench NAME [--json FILE]``, each beside its peer in the same run."""
