"""Pipelines of stages: schedules, partitions, timelines simulated and measured, workers and what they send."""
