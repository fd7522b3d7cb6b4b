"""The items in a FAISS index: chosen, built, tuned against exact search, searched, saved."""

from trec_twotower.index.backends.faiss_backend import faiss
from trec_twotower.index.backends.matrix import Matrix, Vectors
from trec_twotower.index.builder import build_index, check_factory
from trec_twotower.index.exact import ExactItems, exact_search
from trec_twotower.index.filters import Allowed, mask_of
from trec_twotower.index.item_index import IndexReport, ItemIndex
from trec_twotower.index.recipe import Recipe, choose_recipe

__all__ = [
    "Allowed",
    "ExactItems",
    "IndexReport",
    "ItemIndex",
    "Matrix",
    "Recipe",
    "Vectors",
    "build_index",
    "check_factory",
    "choose_recipe",
    "exact_search",
    "faiss",
    "mask_of",
]
