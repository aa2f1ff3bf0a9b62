"""Other people's formats: checkpoints of the original repositories."""

from fastadapt.interop.conversion import convert
from fastadapt.interop.published import PublishedFileError, load_published, published_state_dict, read_state_dict

__all__ = ["PublishedFileError", "convert", "load_published", "published_state_dict", "read_state_dict"]
