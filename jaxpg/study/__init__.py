"""The study: which estimator has how much variance, at what batch size, at what cost.

    study_variance      bias, variance, SNR, noise scale, seconds of every estimator
    study_off_policy    bias and variance of ratios as the policies drift apart
    study_learning      what lower variance buys: learning curves
    study_batch_size    time to a target return against batch size

Each takes a frozen record of settings and leaves a folder with a report, figures, CSV
and JSON; given the same folder again, it goes on where it was interrupted. On the
command line: `jaxpg study variance --quick`.
"""

from jaxpg.study.batch_size import study_batch_size
from jaxpg.study.learning import study_learning
from jaxpg.study.off_policy import study_off_policy
from jaxpg.study.settings import (
    BatchSizeConfig,
    LearningConfig,
    OffPolicyConfig,
    VarianceConfig,
    quick_batch_size,
    quick_learning,
    quick_off_policy,
    quick_variance,
)
from jaxpg.study.subjects import Subject, fresh_subject, from_checkpoint
from jaxpg.study.variance import StudyResult, study_variance

__all__ = [
    "BatchSizeConfig",
    "LearningConfig",
    "OffPolicyConfig",
    "StudyResult",
    "Subject",
    "VarianceConfig",
    "fresh_subject",
    "from_checkpoint",
    "quick_batch_size",
    "quick_learning",
    "quick_off_policy",
    "quick_variance",
    "study_batch_size",
    "study_learning",
    "study_off_policy",
    "study_variance",
]
