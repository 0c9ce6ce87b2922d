"""``python -m uniap_tune``."""

import sys

from uniap_tune.cli import main

sys.exit(main())
