"""The ``wanda-lightning`` command; nothing is imported before it is asked for."""
