"""The study: which estimator has how much variance, at what batch size, at what cost.

    study_variance      bias, variance, SNR, noise scale, seconds of every estimator
    study_off_policy    bias and variance of ratios as the policies drift apart
    study_learning      what lower variance buys: learning curves
    study_batch_size    time to a target return against batch size

Each leaves a folder with a report, figures, CSV and JSON, and goes on where it was
interrupted. On the command line: `jaxpg study variance --quick`.
"""

__all__: list[str] = []
