"""Text → documents → tokens → sequences, with exact token shares at every moment of a run.

Read in this order: `plan` (which source gives the next sequence), `sequences` (which tokens it holds), `tokens`
(how a source becomes memory-mapped tokens), `sources` (where documents come from).
"""
