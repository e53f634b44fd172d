"""Preloaded last, by the process that forks: what the libraries made is left out of the ranks' collections.

A rank's first two full collections would go through all of it, and copy the pages: 0.8 s of a core for each rank.
"""

import gc

gc.collect()
gc.freeze()
