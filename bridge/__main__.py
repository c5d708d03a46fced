"""The command `claude-otel-bridge`, also as `python -m bridge`: a status line cannot wait for all of the others."""

import gc
import os
import sys
from contextlib import suppress


def run() -> None:
    """Run the command and end the process."""
    try:
        main()
    except SystemExit as end:
        if not _is_short() or not isinstance(end.code, int):
            raise
        with suppress(OSError, AttributeError):  # nobody reads it, or it is closed and None
            sys.stdout.flush()
        os._exit(end.code)  # to take itself apart the interpreter needs as long as a tenth of a status line


def main() -> None:
    """Run the command; ends with SystemExit."""
    if _is_short():
        gc.disable()  # over before there is anything to collect
    if sys.argv[1:] == ["statusline"]:
        from bridge import statusline

        sys.exit(statusline.main(os.environ, os.path.expanduser("~")))  # noqa: PTH111  # pathlib starts slowly
    from bridge import cli

    cli.main()


def _is_short() -> bool:
    return sys.argv[1:2] in (["report"], ["statusline"])


if __name__ == "__main__":
    run()
