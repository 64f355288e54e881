"""What a pruning did, as JSON, Markdown, tables and a page."""
