"""The Storage Read API's stand-in, at its old path for one version."""

import sys

from gemma_tuner.testing.cloud.bigquery import read_service as moved

sys.modules[__name__] = moved
