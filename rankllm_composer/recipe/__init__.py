"""YAML and `key=value` overrides to one checked `Recipe`.

In: a YAML file and overrides. Out: a frozen `Recipe`, or one error that lists every problem; never a partly valid one.
"""
