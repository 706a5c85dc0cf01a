"""Text → documents → tokens → sequences, with exact token shares at every moment of a run.

The folders follow the data: `sources` (where documents come from), `cleaning` (which of them are trained on), `tokens`
(how a source becomes memory-mapped tokens), `sequences` (which source gives the next sequence, and what it holds).
"""
