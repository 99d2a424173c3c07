"""Sources of training data, one module a format: records by number, read as they lie on disk."""
from transfusion.data.sources.editing import EditingSettings
from transfusion.data.sources.imagefolder import ImageFolderSettings
from transfusion.data.sources.interleaved import InterleavedSettings
from transfusion.data.sources.llava import LLaVASettings
from transfusion.data.sources.pairs import PairsSettings
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record, Source, Turn
from transfusion.data.sources.sharegpt import ShareGPTSettings
from transfusion.data.sources.text import TextSettings
from transfusion.data.sources.webdataset import WebDatasetSettings

FORMATS = {
    "llava": LLaVASettings,
    "sharegpt": ShareGPTSettings,
    "imagefolder": ImageFolderSettings,
    "webdataset": WebDatasetSettings,
    "pairs": PairsSettings,
    "text": TextSettings,
    "interleaved": InterleavedSettings,
    "editing": EditingSettings,
}
"""the settings of each format by the name it has in a mixture; `settings.open()` gives the source"""

__all__ = ["FORMATS", "DataError", "EditingSettings", "ImageFolderSettings", "InterleavedSettings", "LLaVASettings",
           "PairsSettings", "PictureFile", "PictureRef", "Record", "ShareGPTSettings", "Source", "TextSettings", "Turn",
           "WebDatasetSettings"]
