"""Cloud Storage's store, at its old path for one version."""

import sys

from gemma_tuner.storage import gcs as moved

sys.modules[__name__] = moved
