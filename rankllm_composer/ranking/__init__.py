"""Read rankings from a model, and measure them.

In: an exported model and windows of candidates, or a whole first-stage run. Out: permutations, TREC runs, nDCG and
other measures, and paired comparisons with a significance test.
"""
