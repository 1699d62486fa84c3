"""Report on training runs, finished or not, in one HTML page.

In: run folders. Out: a self-contained page of figures, tables and recipes.
"""
