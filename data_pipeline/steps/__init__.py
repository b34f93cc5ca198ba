"""Steps: record -> record | Rejected(reason)."""

from data_pipeline.steps.decode import Decode
from data_pipeline.steps.resize import Resize

__all__ = ["Decode", "Resize"]
