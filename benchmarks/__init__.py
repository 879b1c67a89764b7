"""Speed, memory and agreement beside the peers: ``benchmarks/<area>/<slug>.py``, one module a paper."""
