"""A language model as a LightningModule, and runs of a Trainer with it."""
