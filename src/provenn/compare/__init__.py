"""Line up parts that do the same job on one task, with the same tuning budget, data order and initial weights.

A task is one file in ``tasks``, a kind of part one file in ``kinds``; both are found by their file. Loads no torch.
"""
