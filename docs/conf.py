"""How Sphinx builds the site and the man pages; script/docs calls it."""

from importlib.metadata import version as installed

project = "Outboard"
author = "The Outboard authors"
project_copyright = author
release = version = installed("outboard")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nitpicky = True
smartquotes = False  # options are written --so

html_theme = "alabaster"
html_theme_options = {
    "description": "The memory engine for virtual machines that clamps on outside the VMM",
    "fixed_sidebar": True,
    "page_width": "1080px",
}
html_copy_source = False
html_show_sphinx = False

# (page, name, one line, authors, section)
man_pages = [
    ("commands", "outboard", "memory engine for virtual machines, from outside the VMM", author, 1),
    ("run", "outboard-vm", "the file that describes a VM", author, 5),
    ("migrate", "outboard-migrate", "move a running VM to another host", author, 7),
    ("snapshot", "outboard-snapshot", "save running VMs and restore them", author, 7),
    ("attach", "outboard-attach", "which VMs can be attached to, and how", author, 7),
    ("enlightenment", "outboard-enlightenment", "what is asked of the guest, and what follows from it", author, 7),
    ("kernel-features", "outboard-kernel-features", "what is probed in the host's kernel", author, 7),
    ("security", "outboard-security", "who trusts whom", author, 7),
    ("protocol", "outboard-protocol", "what two hosts say to each other", author, 7),
]
man_show_urls = True
