"""Systems beyond control: trained by the score function, with no environment at all.

    base            System: init, update, evaluate, picture
    digits          handwritten digits, of scikit-learn or MNIST
    registry        systems by name
    program         what runs between two visits of the host
    runs            a run on disk
    training        train, resume, evaluate

`jaxpg train NAME` trains one, `jaxpg train --resume RUN` goes on.
"""

from jaxpg.systems.base import Recipe, RunSettings, System

__all__ = ["Recipe", "RunSettings", "System"]
