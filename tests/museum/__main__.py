"""See the package."""

import sys

from tests.museum import GREEN, run, verdict
from tests.museum.exhibits import EXHIBITS

if unknown := set(sys.argv[1:]) - EXHIBITS.keys():
    sys.exit(f"no exhibit is called {', '.join(sorted(unknown))}; there are {', '.join(EXHIBITS)}")
missed = run(sys.argv[1:] or EXHIBITS)
if len(sys.argv) == 1:
    guards = sorted({guard for exhibit in EXHIBITS.values() for guard in exhibit.guards})
    code, output = verdict(guards)
    sys.stderr.write(f"the guards on the tree as it is: {'green' if code == GREEN else f'NOT GREEN ({code})'}\n")
    if code != GREEN:
        sys.exit(output)
sys.exit(f"missed: {', '.join(missed)}" if missed else 0)
