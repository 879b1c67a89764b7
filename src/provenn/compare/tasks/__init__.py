"""The tasks that ship, one file each: ``digits_mlp.py`` defines ``TASK``, whose name is ``digits-mlp``."""
