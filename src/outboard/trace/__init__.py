"""Who touched what: the write trace."""
