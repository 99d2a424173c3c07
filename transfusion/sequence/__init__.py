"""From parts, Text and Image, to packed rows of tokens and patches."""
from transfusion.sequence.encoding import Document, encode, with_clean_copies
from transfusion.sequence.layout import ImageLayout, Modality
from transfusion.sequence.packing import IMAGE_ATTENTION, Sequence, lay_out, pack
from transfusion.sequence.parts import Image, Part, Text
from transfusion.sequence.split import split_rows

__all__ = ["IMAGE_ATTENTION", "Document", "Image", "ImageLayout", "Modality", "Part", "Sequence", "Text", "encode",
           "lay_out", "pack", "split_rows", "with_clean_copies"]
