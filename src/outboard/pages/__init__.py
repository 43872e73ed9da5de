"""Pages as data: which (PageSet), where (Residency), what (content). No I/O.

A guest's pages are numbered from 0 in units of :data:`PAGE_SIZE`, whatever the size of the mapping behind them.
"""

PAGE_SIZE = 4096
LARGE = 512
"""Pages in a large page: 2 MiB."""
