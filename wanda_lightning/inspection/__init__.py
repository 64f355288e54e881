"""Looking at models without loading them."""

from wanda_lightning.inspection.inspect_model import inspect_model as inspect_model
