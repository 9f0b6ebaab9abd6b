"""What can go wrong between a name and a model, one class each. Leaves out: nothing; every zoo error is here."""

from __future__ import annotations


class ZooError(ValueError):
    """A name, folder or URL could not be turned into a model. The message says why and what to do."""


class UnknownModel(ZooError):
    """No model of that name is shipped, and the Hub (or timm) has none either."""


class GatedModel(ZooError):
    """The model is on the Hub, but its licence has to be accepted, with a token, before its config can be read."""


class OfflineError(ZooError):
    """The model is not shipped and not in the local cache, and the Hub cannot be reached."""


class BadURL(ZooError):
    """A URL that does not point to a model on the Hub."""


class NoConfig(ZooError):
    """A folder or repository in which neither a usable config.json nor safetensors weights were found."""


class RemoteCodeNeeded(ZooError):
    """The model's classes are Python code in its repository, and running that code was not allowed."""
