"""Sources of training data, one module a format: records by number, read as they lie on disk."""
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record, Source, Turn

__all__ = ["DataError", "PictureFile", "PictureRef", "Record", "Source", "Turn"]
