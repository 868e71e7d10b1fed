"""``python -m planrt`` is the command ``planrt``."""

import sys

from planrt.cli import main

sys.exit(main())
