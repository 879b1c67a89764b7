"""The kinds of parts that can be compared, one file each: how a part plugs into a task, and the axes of the result.

To add a kind, add a file that defines ``KIND``; then name the kind, with its tuning space, in the tasks that suit it.
"""
