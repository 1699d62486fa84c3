"""Complete checkpoints on disk and in an object store.

In: Composer state and a folder or URL. Out: checkpoints that are complete or absent, loaded as data and never as code.
"""
