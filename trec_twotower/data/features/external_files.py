"""Files outside the dataset that features read: vocabularies and language models."""

from __future__ import annotations

from pathlib import Path

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import LEARNED, LanguageModelFeature, VocabularyFeature
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.features.text import check_folder
from trec_twotower.data.features.vocabulary import words_of_file


def check_files(config: RunConfig) -> None:
    """Raise ConfigError if a vocabulary or a language model of a feature cannot be used.

    This is for the config of a new run. A saved run contains its vocabulary and does not need the file.
    """
    for feature in (*config.user, *config.item):
        if isinstance(feature, VocabularyFeature) and feature.vocabulary != LEARNED:
            words_of_file(feature)
        elif isinstance(feature, LanguageModelFeature):
            check_folder(feature)


def external_files(feature: FeatureSpec) -> list[Path]:
    """Return the files outside the dataset that a feature reads."""
    if isinstance(feature, VocabularyFeature) and feature.vocabulary != LEARNED:
        return [Path(feature.vocabulary)]
    return sorted(Path(feature.folder).glob("*.*")) if isinstance(feature, LanguageModelFeature) else []
