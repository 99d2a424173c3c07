"""From parts, Text and Image, to packed rows of tokens and patches."""
from transfusion.sequence.packing import Document, Image, Part, Sequence, Text, encode, lay_out, pack, with_clean_copies

__all__ = ["Document", "Image", "Part", "Sequence", "Text", "encode", "lay_out", "pack", "with_clean_copies"]
