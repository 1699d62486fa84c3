"""Read rankings from a model and measure them.

In: an exported model with windows of candidates or a first-stage run. Out: permutations, TREC runs, nDCG and other
measures, and paired comparisons with a significance test.
"""
