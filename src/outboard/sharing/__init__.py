"""Page sharing: finding equal pages, sharing them, and giving them back where they are read much."""
