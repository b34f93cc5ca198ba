"""Sources: where records come from, in units that can be read alone."""

from data_pipeline.sources.folder import Folder
from data_pipeline.sources.manifest import Chat, Manifest
from data_pipeline.sources.questions import SceneQuestions
from data_pipeline.sources.repeat import Repeat
from data_pipeline.sources.scenes import Scenes
from data_pipeline.sources.urls import UrlList
from data_pipeline.sources.webdataset import WebDataset

__all__ = ["Chat", "Folder", "Manifest", "Repeat", "SceneQuestions", "Scenes", "UrlList", "WebDataset"]
