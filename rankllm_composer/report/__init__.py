"""Finished and running runs as one HTML page.

In: run folders. Out: a self-contained page of figures, tables and settings.
"""
