"""The items in a FAISS index: built, tuned against exact search, searched, saved. The only import of faiss."""

from trec_twotower.index.build import build_index
from trec_twotower.index.engine import exact_search, faiss
from trec_twotower.index.search import IndexReport, ItemIndex

__all__ = ["IndexReport", "ItemIndex", "build_index", "exact_search", "faiss"]
