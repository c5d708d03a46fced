"""What to do when this process, or the machine, has no descriptor left for another file.

Law: a file that cannot be opened for that reason says nothing of itself. What was to be read is read later, what was
to be written is refused for now, and nobody concludes that something is gone or broken.
"""

import contextlib
import errno
from collections.abc import Iterator

RAN_OUT = frozenset({errno.EMFILE, errno.ENFILE})
ADVICE = "too many open files; raise the limit (ulimit -n, LimitNOFILE)"


def ran_out(error: BaseException) -> bool:
    """Whether it is for want of a descriptor that something failed."""
    return isinstance(error, OSError) and error.errno in RAN_OUT


@contextlib.contextmanager
def passing_over() -> Iterator[None]:
    """Pass over what the file system refuses, but not over a want of descriptors, which is raised."""
    try:
        yield
    except OSError as error:
        if ran_out(error):
            raise
