"""The command `claude-otel-bridge`, also as `python -m bridge`: a status line cannot wait for all of the others."""

import gc
import os
import sys


def main() -> None:
    """Run the command; ends with SystemExit."""
    if sys.argv[1:2] in (["report"], ["statusline"]):
        gc.disable()  # over before there is anything to collect
    if sys.argv[1:] == ["statusline"]:
        from bridge import statusline

        sys.exit(statusline.main(os.environ, os.path.expanduser("~")))  # noqa: PTH111  # pathlib starts slowly
    from bridge import cli

    cli.main()


if __name__ == "__main__":
    main()
