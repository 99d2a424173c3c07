"""From parts, Text and Image, to packed rows of tokens and patches."""
from transfusion.sequence.encoding import Document, encode, with_clean_copies
from transfusion.sequence.layout import ImageLayout, Modality
from transfusion.sequence.packing import IMAGE_ATTENTION, Sequence, lay_out, pack
from transfusion.sequence.parts import Image, Part, Text
from transfusion.sequence.share import CONTEXT_ATTENTION, Context, Share, share
from transfusion.sequence.split import split_rows

__all__ = ["CONTEXT_ATTENTION", "IMAGE_ATTENTION", "Context", "Document", "Image", "ImageLayout", "Modality", "Part",
           "Sequence", "Share", "Text", "encode", "lay_out", "pack", "share", "split_rows", "with_clean_copies"]
