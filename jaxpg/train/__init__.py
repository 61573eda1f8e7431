"""Training: what happens on the host between jitted chunks of updates.

`provenance`, `log`, `checkpoint` and `render` are the side effects, each usable alone:
they write files and touch no random key, so a run computes the same numbers with or
without them. `distributed` makes several processes one run.
"""

__all__: list[str] = []
