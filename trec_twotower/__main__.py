"""`python -m trec_twotower` and the installed command `trec-twotower`."""

import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the process's command line, and end the process."""
    try:
        from trec_twotower.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("trec-twotower: interrupted before it began.\n")
        sys.stderr.flush()
        os._exit(130)
    sys.exit(main())


if __name__ == "__main__":
    run()
