"""Helpers shared by tests: tiny models and data, launched runs, a loopback object store."""
