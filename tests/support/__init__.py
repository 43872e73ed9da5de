"""What tests share: named skips, and small C programs whose memory we work on."""
