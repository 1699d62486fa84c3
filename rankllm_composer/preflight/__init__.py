"""What a run will do, before it is started.

In: a recipe. Out: an estimate of steps, memory per rank, FLOPs and hours; one record as the model will see it; and
suggestions where a plan does not fit.
"""
