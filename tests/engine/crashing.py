"""A method that fails in the middle of a model."""

from wanda_lightning.methods import Wanda


class CrashError(Exception):
    pass


class Crashing(Wanda):
    """Prunes so many matrices."""

    limit = 0

    def prune(self, *args):
        type(self).limit -= 1
        if self.limit < 0:
            raise CrashError
        return super().prune(*args)
