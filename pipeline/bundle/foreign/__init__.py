"""Bundles in the form of MONAI's model zoo, which volseg did not write.

`settings` holds how they are opened, `files` reads what their files state, `wiring` makes their
parts by MONAI's parser, `imports` keeps their modules apart, `engine` drives their evaluator,
`labels` checks its output, `replacement` has volseg's inferer in place of theirs where `agreement`
finds the same labels, and `model` is the whole as the batch knows it.
"""

from pipeline.bundle.foreign.files import foreign_configuration
from pipeline.bundle.foreign.model import ForeignBundle, open_foreign

__all__ = ["ForeignBundle", "foreign_configuration", "open_foreign"]
