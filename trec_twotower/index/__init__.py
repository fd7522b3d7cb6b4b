"""The items in a FAISS index: chosen, built, tuned against exact search, searched, saved. The only import of faiss."""

from trec_twotower.index.build import build_index, check_factory
from trec_twotower.index.engine import Matrix, OnDevice, Vectors, exact_search, faiss
from trec_twotower.index.filters import Allowed, mask_of
from trec_twotower.index.recipe import Recipe, choose_recipe
from trec_twotower.index.search import IndexReport, ItemIndex

__all__ = [
    "Allowed",
    "IndexReport",
    "ItemIndex",
    "Matrix",
    "OnDevice",
    "Recipe",
    "Vectors",
    "build_index",
    "check_factory",
    "choose_recipe",
    "exact_search",
    "faiss",
    "mask_of",
]
