"""``python -m streamprep``, ``torchrun -m streamprep``."""

import sys

from streamprep.cli import main

sys.exit(main())
