"""How the small Debian guest that tests, bench and demo run is built."""
