"""The logger of volseg. The command line shows it; scripts configure it as any logger."""

import logging

LOGGER = logging.getLogger("volseg")
