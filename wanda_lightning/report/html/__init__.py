"""The report as a page that needs no network and no scripts."""
