"""Configuration lives at the edge: the shape of the settings and their defaults, and where the defaults come from.

Knows nothing of what they do. `metarec.config.run` holds the settings of a run together, `metarec.config.reading` reads
them.
"""

from metarec.config.adaptation import AdapterConfig, MetaConfig, Start
from metarec.config.collaborative import (
    CollaborativeConfig,
    EncoderTuningConfig,
    FeatureName,
    GPConfig,
    KernelConfig,
    LinearConfig,
    PosteriorTuningConfig,
    ProjectionConfig,
    StackConfig,
)
from metarec.config.reading import flattened, merged, override, read_yaml, validated
from metarec.config.run import Dtype, Precision, RunConfig
from metarec.config.section import Section, checked
from metarec.config.training import AugmentConfig, FineTuneConfig, PrivateConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "AugmentConfig",
    "CollaborativeConfig",
    "Dtype",
    "EncoderTuningConfig",
    "FeatureName",
    "FineTuneConfig",
    "GPConfig",
    "KernelConfig",
    "LinearConfig",
    "MetaConfig",
    "PosteriorTuningConfig",
    "Precision",
    "PrivateConfig",
    "ProjectionConfig",
    "RunConfig",
    "Section",
    "StackConfig",
    "Start",
    "TrainConfig",
    "checked",
    "flattened",
    "merged",
    "override",
    "read_yaml",
    "validated",
]
