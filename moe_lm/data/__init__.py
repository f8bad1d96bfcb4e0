"""Documents to batches: sources, tokenizer, packing, mixture and a loader that resumes bit for bit."""

from moe_lm.data.cache import Split, TokenizedSource
from moe_lm.data.loader import PreparedData, TrainLoader, prepare_data
from moe_lm.data.packing import IGNORED, Batch
from moe_lm.data.sources import Document, is_held_out, open_source
from moe_lm.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "IGNORED",
    "Batch",
    "Document",
    "PreparedData",
    "Split",
    "TokenizedSource",
    "TrainLoader",
    "end_of_text_id",
    "is_held_out",
    "load_tokenizer",
    "open_source",
    "prepare_data",
    "save_tokenizer",
    "train_tokenizer",
]
