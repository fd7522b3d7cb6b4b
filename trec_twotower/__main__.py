"""`python -m trec_twotower` is the installed command `trec-twotower`."""

import sys

from trec_twotower.cli import main

sys.exit(main())
