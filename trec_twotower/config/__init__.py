"""All settings, one file per section, and the loading of configs."""

from trec_twotower.config.evaluation import IndexConfig as IndexConfig
