"""Sources: where records come from. A source is iterable and yields Record | Rejected."""

from data_pipeline.sources.folder import Folder
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.scenes import Scenes

__all__ = ["Folder", "Manifest", "Scenes"]
