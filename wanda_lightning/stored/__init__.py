"""Models in a folder, read and written tensor by tensor: how sparse they are, and how to ship them without zeros."""
