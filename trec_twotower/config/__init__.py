"""Every setting, one file per section, and how a config is loaded."""

from trec_twotower.config.evaluation import IndexConfig as IndexConfig
