"""Object stores, atomic files and folders, and locks.

In: paths and URLs. Out: files and folders that are complete or absent, transfers with retries, and locks between
processes. Imports nothing else of this package.
"""
