"""MDS sets to packed microbatches.

In: sets on disk or in an object store, and a tokenizer. Out: a Composer `DataSpec` that yields every list of an epoch
exactly once over all ranks, in microbatches of nearly equal token counts without padding.
"""
