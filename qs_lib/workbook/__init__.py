"""The notebooks' machinery: parameters, stages of a run, sweeps, figures, tables, the scoreboard."""

import os
from functools import partialmethod

from tqdm.notebook import tqdm_notebook

if os.environ.get("TQDM_DISABLE"):  # tqdm's own variable, which its widgets overlook
    tqdm_notebook.__init__ = partialmethod(tqdm_notebook.__init__, disable=True)
