"""Other people's code and formats: their adapter layers on fused ops, checkpoints of the original repositories, adapter files of PEFT and AdapterHub."""

from fastadapt.interop.adapterhub import from_adapterhub, to_adapterhub
from fastadapt.interop.conversion import convert
from fastadapt.interop.fusing import FuseReport, fuse, unfuse
from fastadapt.interop.peft import from_peft, to_peft
from fastadapt.interop.published import PublishedFileError, load_published, published_state_dict, read_state_dict

__all__ = [
    "FuseReport", "PublishedFileError", "convert", "from_adapterhub", "from_peft", "fuse", "load_published", "published_state_dict", "read_state_dict", "to_adapterhub", "to_peft",
    "unfuse",
]  # fmt: skip
