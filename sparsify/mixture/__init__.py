"""Text → documents → tokens → windows, with exact token shares at every moment of a run.

Read in this order: `plan` (which source gives the next window), `windows` (which tokens it holds), `tokens`
(how a source becomes memory-mapped tokens), `sources` (where documents come from).
"""
