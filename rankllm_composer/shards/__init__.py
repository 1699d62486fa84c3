"""Records to MDS sets, published whole.

In: an iterator of records and an output folder or URL. Out: a complete set of MDS shards with its index and build
manifest; and the same set verified, merged or read record by record.
"""
