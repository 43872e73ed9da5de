"""Where absent pages live."""
