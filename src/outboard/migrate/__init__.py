"""Moving a running VM to another host: four methods over one machine of states."""
