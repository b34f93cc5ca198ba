"""Steps: record -> record | Rejected(reason)."""

from data_pipeline.steps.decode import Decode

__all__ = ["Decode"]
