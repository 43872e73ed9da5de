"""What the kernel offers, one module per man page. No policy, no logging, no retry.

Layouts and system call numbers are those of x86-64.
"""

import platform

if platform.machine() != "x86_64":
    raise ImportError(
        f"outboard knows the system calls and registers of x86_64 only, and this machine is {platform.machine()}"
    )
