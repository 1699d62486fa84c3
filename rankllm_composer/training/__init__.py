"""A run, from a recipe to exported folders; every Composer callback.

In: a checked `Recipe`. Out: a run folder with metrics, checkpoints and exported models, resumed exactly when rerun.
"""
