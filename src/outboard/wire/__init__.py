"""What hosts say to one another: frames, streams, TLS, tokens, pace. No knowledge of VMs."""
