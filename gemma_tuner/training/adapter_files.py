"""An adapter's folder, at its old path for one version."""

import sys

from gemma_tuner.models import adapter_files as moved

sys.modules[__name__] = moved
