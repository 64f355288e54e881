"""What the callbacks share: batches, progress, loggers, folders."""
