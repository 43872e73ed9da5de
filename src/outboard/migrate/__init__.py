"""Moving a running VM to another host: pre-copy, post-copy, hybrid and enlightened post-copy over one machine of states."""
